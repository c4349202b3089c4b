"""Training rows read while training, for files larger than memory and data sets of the Hub.

The order is a pure function of the sources and the seed, and has no end: a resumed run reads it again up to its step,
and continues bit for bit. Each pass over a source is shuffled within a buffer of `BUFFER` rows; the next source is
drawn by the weights, which are here the shares of the rows themselves, as nobody knows the sources' sizes.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from itertools import count, islice
from typing import Any

from lorary.errors import DataError
from lorary.train.config.data_section import DataSection
from lorary.train.config.sources import Source, as_source
from lorary.train.data._records import Record, convert
from lorary.train.data._sources import stream_source
from lorary.train.data.load import columns_of, format_of_source, is_blank, renamed, separated, wanted_fields
from lorary.train.data.row_formats import Example, normalise
from lorary.train.data.tokenize import Encoder, Row, Tokens, fitting, policy, tokenize

BUFFER = 10_000
CHECKED = 1000


class RowStream:
    """The endless training rows of a stream.

    Args:
        section: the `data` section of the configuration.
        tokenizer: of the base.
        task: of the run.
        seed: of the order.

    Attributes:
        head: the first `CHECKED` rows of the order, for the lint.
        notes: what a user should know, such as a detected format.
        digest: of these rows, so that a resumed run notices other data.

    Raises:
        DataError: a source cannot be read, its first rows have no common format, or the task cannot use it.
    """

    def __init__(self, section: DataSection, tokenizer: Any, task: str, seed: int) -> None:
        self.section, self.tokenizer, self.task, self.seed = section, tokenizer, task, seed
        self.sources = [as_source(source) for source in section.train]
        self.formats, notes = [], []
        for source in self.sources:
            first = list(islice(self._records(source), 100))
            if not first:
                raise DataError(f"{source} has no rows")
            found, declared = format_of_source(first, source, section, task)
            self.formats.append(found)
            notes.append(f"{source}: a stream of rows in the format {found}{'' if declared else ' (detected)'}")
        drawn = list(islice(self._examples(), CHECKED))
        self.head: Tokens = tokenize(
            [example for _, example in drawn], tokenizer, section, sources=[name for name, _ in drawn], streamed=True
        )
        notes.append(f"streaming: the first {len(drawn):,} rows are checked before training, the others as they come")
        self.notes = tuple(notes)
        self.digest = hashlib.sha256(json.dumps([seed, self.head.rows]).encode()).hexdigest()

    def dataset(self) -> Any:
        """The rows as a data set of the trainer."""
        import datasets

        features = datasets.Features({key: datasets.List(datasets.Value("int64")) for key in self.head.rows[0]})
        return datasets.IterableDataset.from_generator(self._rows, features=features)

    def _rows(self) -> Iterator[Row]:
        examples = self._examples()
        encoder = Encoder(self.tokenizer, self.section, ())
        for _, example in examples:
            (encoded,) = convert([example], encoder.encode, "the data")
            for row in encoded.rows:
                yield from fitting(row, policy(self.section, example), self.section.max_length)

    def _examples(self) -> Iterator[tuple[str, Example]]:
        """(name of the source, example), without end."""
        streams = [self._endless(number) for number in range(len(self.sources))]
        weights = [source.weight for source in self.sources]
        draw = random.Random(f"stream/{self.seed}")
        while True:
            (number,) = draw.choices(range(len(streams)), weights)
            yield str(self.sources[number]), next(streams[number])

    def _endless(self, number: int) -> Iterator[Example]:
        """One pass over a source after another."""
        source = self.sources[number]
        for turn in count():
            empty = True
            for example in _shuffled(self._pass(number), random.Random(f"stream/{self.seed}/{number}/{turn}")):
                empty = False
                yield example
            if empty:
                raise DataError(f"every text of {source} is empty")

    def _pass(self, number: int) -> Iterator[Example]:
        source, kind = self.sources[number], self.formats[number]
        for record in self._records(source):
            if kind == "text" and is_blank(record.value):
                continue
            (example,) = normalise([record], kind, str(source))
            yield separated(example, self.section.separator)

    def _records(self, source: Source) -> Iterator[Record]:
        columns, wanted = columns_of(source, self.section), wanted_fields(source, self.section, self.task)
        for record in stream_source(source, "train", self.section.subset, wanted):
            yield renamed(record, columns)


def _shuffled(examples: Iterator[Example], generator: random.Random) -> Iterator[Example]:
    """The examples, each once, in an order that a buffer allows."""
    buffer = list(islice(examples, BUFFER))
    generator.shuffle(buffer)
    for example in examples:
        i = generator.randrange(len(buffer))
        yield buffer[i]
        buffer[i] = example
    yield from buffer
