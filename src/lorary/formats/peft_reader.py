"""A PEFT folder (LoRA, DoRA, AdaLoRA, VeRA) as an `Adapter`: strict about every tensor, before any is read.

With the model at hand, the sites are those that PEFT would adapt in it, and every one of them must have its two
factors in the file. Without, they are those that the file has factors for; a layer's kind beyond what a shape says
(GPT-2's Conv1D, biases) is only known to the model, and so is how many inputs a layer of a VeRA has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from lorary.adapted import base_parameters, plain_modules
from lorary.adapter import Adapter
from lorary.errors import FileError, Problem, nearest
from lorary.fingerprint import Fingerprint, base_name
from lorary.formats import peft_keys, strict_json
from lorary.formats.banks import corners, drawn
from lorary.formats.compare import compare, mixed_dtypes
from lorary.formats.findings import Findings
from lorary.formats.folder import read_bytes
from lorary.formats.peft_config import NAME, PeftConfig, read_config
from lorary.formats.peft_fulls import Fulls, full_tensors
from lorary.formats.peft_sorts import KINDS
from lorary.formats.peft_strangers import strange
from lorary.formats.peft_writer import sliding
from lorary.formats.strict_json import named, show
from lorary.formats.tensor_file import TensorFile
from lorary.formats.values import absurd, does_nothing, not_finite
from lorary.methods.adalora import ByStartRank, Orthogonal, SmallNormal, Spectral
from lorary.methods.adalora_budget import RankBudget
from lorary.methods.dora import Direction
from lorary.methods.lora import Add, ByRank, Fixed, Kaiming, LowRank
from lorary.methods.rslora import BySqrtRank
from lorary.methods.vera import Projections, Vectors
from lorary.placed import Placed, shared_shapes
from lorary.record import Method
from lorary.sites import Site, kind_of, site
from lorary.words import Join, Scale

WEIGHTS = "adapter_model.safetensors"
MOST_JSON = 4 * 2**20
NO_OP = "every update is zero: this adapter changes nothing"


def read_peft(folder: Path, model: nn.Module | None, findings: Findings) -> Adapter:
    """Reads the adapter that PEFT saved in `folder`.

    Args:
        folder: a resolved folder.
        model: the base, plain or adapted; it is only looked at.
        findings: what is wrong goes there, and is raised from there.

    Raises:
        FileError: every reason why it cannot be used.
    """
    config = None
    with findings.gathering(NAME):
        config = read_config(parsed_json(folder, NAME), findings)
    with TensorFile(folder, weights_name(folder)) as file:
        if config is None or findings.fatal:  # what would follow from a wrong configuration says nothing
            raise FileError("")
        return _Reader(config, model, findings, file).adapter()


def parsed_json(folder: Path, name: str) -> object:
    """The value in a folder's JSON file.

    Raises:
        FileError: the file or its JSON is not acceptable.
    """
    try:
        return strict_json.parse(read_bytes(folder, name, MOST_JSON), MOST_JSON)
    except ValueError as error:
        if isinstance(error, FileError):
            raise
        raise FileError("", [Problem(name, str(error))]) from None


def weights_name(folder: Path) -> str:
    """The name of the tensor file, after making sure that it is not a pickle.

    Raises:
        FileError: there are only pickles, which are never opened.
    """
    pickles = [n for n in ("adapter_model.bin", "adapter_model.pt") if (folder / n).exists()]
    if pickles and not (folder / WEIGHTS).exists():
        fix = "where you trust its author, load it with PEFT and save it again: PEFT writes safetensors"
        what = "is a pickle, which can run code when it is read; it was not opened"
        raise FileError("", [Problem(pickles[0], what, fix)])
    return WEIGHTS


class _Reader:
    """One reading of one folder; its steps share what they know."""

    def __init__(self, config: PeftConfig, model: nn.Module | None, findings: Findings, file: TensorFile) -> None:
        self.config, self.findings, self.file = config, findings, file
        self.layers = plain_modules(model) if model is not None else None
        self.model = model
        self.names: dict[str, str] = {}  # without prefix -> as in the file
        for name in file.header.tensors:
            short = peft_keys.short(name)
            if config.sort == "DoRA" and short.endswith(f".{peft_keys.MAGNITUDE}.weight"):
                short = short.removesuffix(".weight")  # as a module's weight, which PEFT's files leave out
            if short in self.names:
                other = "prefix" if name == peft_keys.PREFIX + short or name == short else "ending"
                findings.fatal.append(Problem(named(name), f"is there twice, with and without its {other}"))
            self.names[short] = name
        self.found = {short: file.header.tensors[name] for short, name in self.names.items()}

    def adapter(self) -> Adapter:
        """The adapter, or every reason why there is none."""
        placed = self._placed()
        fulls = full_tensors(self.config, self.model, {p.site.name for p in placed}, self.found, self.findings)
        expected, vital = self._expected(placed)
        expected |= fulls.expected
        found = {name: entry for name, entry in self.found.items() if name not in fulls.copies}
        usable = compare(expected, found, self.findings, self._explain, vital)
        if not placed and not self.findings.fatal:
            self.findings.fatal.append(self._nothing())
        self.findings.settle()
        values = self._values(usable, fulls)
        shared = corners(placed, self._banks(placed, values))
        tensors = {p.site.name: peft_keys.decoded(p, _filled(p, values)) | shared[p.site.name] for p in placed}
        full = fulls.values(values, self.findings)
        if does_nothing(placed, tensors):
            self.findings.alerts.append(NO_OP)
        self.findings.notes += mixed_dtypes(self.found)
        method = self._method(self.config.r, self.config.alpha, tuple(full))
        base = Fingerprint(name=base_name(self.config.base))
        return Adapter(method, placed, tensors, full, base, self.findings.conclude())

    def _expected(self, placed: tuple[Placed, ...]) -> tuple[dict[str, tuple[int, ...]], set[str]]:
        """name -> shape of all that the sites need, and those of them that nothing can stand for."""
        expected: dict[str, tuple[int, ...]] = {}
        vital = set()
        for p in placed:
            for role, (name, shape) in peft_keys.layout(p).items():
                expected[name] = shape
                if role == "m":
                    vital.add(name)
                    expected[name] = self._magnitudes(p.site, name)
        if self.config.saved:
            expected |= {peft_keys.BANKS[role]: size for role, size in shared_shapes(placed).items()}
        return expected, vital | set(peft_keys.BANKS.values())

    def _magnitudes(self, at: Site, name: str) -> tuple[int, ...]:
        """The shape of a site's magnitudes: whichever the file has of those that are in use."""
        known = peft_keys.magnitudes(at)
        shape = self.found[name].shape if name in self.found else known[0]
        if shape in known:
            return shape
        if shape[:1] == (1,) and torch.Size(shape).numel() == at.inp:
            what = (
                f"has the shape {list(shape)}, that of a magnitude for each input; DoRA as published has one per output"
            )
            fix = f"where they are the outputs' all the same, write them as [{at.out}]"
            self.findings.fatal.append(Problem(name, what, fix))
            return shape
        return known[0]

    def _banks(self, placed: tuple[Placed, ...], values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """role -> what the sites share, from the file or as PEFT draws it."""
        if self.config.saved or not placed:
            return {role: values[peft_keys.BANKS[role]] for role in shared_shapes(placed)}
        method, sizes = placed[0].method, shared_shapes(placed)
        self.findings.notes.append(f"its projections were drawn from the seed {self.config.seed}: the file has none")
        return drawn(method, placed, dict.fromkeys(sizes, torch.float32))

    def _placed(self) -> tuple[Placed, ...]:
        if self.config.sort == "VeRA" and self.layers is None:
            what = "how many inputs each layer of a VeRA has is only known to the model"
            self.findings.fatal.append(Problem("", what, "read it onto its base: lorary.load(model, folder)"))
            self.findings.settle()
        try:
            sites = list(self._sites_of_model() if self.layers is not None else self._sites_of_file())
            names = {s.name for s in sites}
            self.findings.fatal += [
                Problem(f"{NAME}: rank_pattern", f"is about {show(name)}, which is not adapted")
                for name in self.config.kept
                if name not in names
            ]
            return tuple(Placed(s, self._method_at(s.name)) for s in sites)
        except ValueError as error:  # the patterns' budget
            self.findings.fatal.append(Problem(NAME, str(error)))
            self.findings.settle()  # the patterns cannot be asked any more, and the rest of the check would
            return ()

    def _sites_of_model(self) -> Iterator[Site]:
        modules = cast("dict[str, nn.Module]", self.layers)
        named_in_file = self._named()
        for name, layer in modules.items():
            if not name or kind_of(layer) is None or not self.config.targets_module(name):
                continue
            if self.config.targets is None and name not in named_in_file:
                continue
            parent = modules.get(name.rpartition(".")[0])
            if isinstance(parent, nn.MultiheadAttention):
                what = "nn.MultiheadAttention reads its weight and never calls it: an adapter there would do nothing"
                self.findings.fatal.append(Problem(name, what))
                continue
            found = site(name, layer)
            if found.kind not in KINDS.get(self.config.sort, (found.kind,)):
                what = f"is of kind {found.kind}, which PEFT's {self.config.sort} never adapts"
                self.findings.fatal.append(Problem(name, what))
            elif found.groups > 1:
                what = f"PEFT's LoRA of a convolution with {found.groups} groups is no change of its weight"
                self.findings.fatal.append(Problem(name, what, "it can neither be merged nor read here"))
            elif what := sliding(layer, self.config.sort):
                self.findings.fatal.append(Problem(name, f"is {what}", "it can neither be merged nor read here"))
            else:
                yield found

    def _named(self) -> dict[str, None]:
        """The sites that the file has tensors for, in its order."""
        keys = (peft_keys.parsed(name, self.config.sort) for name in self.found)
        return dict.fromkeys(key.site for key in keys if key is not None)

    def _sites_of_file(self) -> Iterator[Site]:
        for name in self._named():
            if not name or not self.config.targets_module(name):
                continue
            embedding = f"{name}.lora_embedding_A" in self.found
            ending = "" if self.config.sort == "AdaLoRA" else ".weight"
            leaves = ("lora_embedding_A", "lora_embedding_B") if embedding else (f"lora_A{ending}", f"lora_B{ending}")
            pair = [f"{name}.{leaf}" for leaf in leaves]
            lonely = [n for n in pair if n not in self.found]
            if lonely:
                self.findings.tolerable.append(Problem(lonely[0], "is missing, and its partner alone says nothing"))
                for n in set(pair) - set(lonely):
                    del self.found[n]
                continue
            A, B = (self.found[n].shape for n in pair)
            if len(A) not in (2, 3, 4, 5) or len(B) != len(A):
                what = f"has the shape {list(A)} and its partner {list(B)}: no layer has such factors"
                self.findings.fatal.append(Problem(pair[0], what))
                continue
            yield _site_of_shapes(name, A, B, embedding, self.config.transposed)

    def _method_at(self, name: str) -> Method:
        method = self._method(self.config.rank(name), self.config.alpha_at(name))
        kept = self.config.kept.get(name)
        return method if kept is None else method.replace(delta=Spectral(self.config.r, kept))

    def _method(self, r: int, alpha: float, full: tuple[str, ...] = ()) -> Method:
        config = self.config
        if config.sort == "AdaLoRA":
            # PEFT accepts a target above the start, which asks for nothing
            budget = RankBudget(min(config.target, r), *config.phases, config.every, config.beta1, config.beta2)
            rules = (budget, Orthogonal(config.orthogonality))
            scale: Scale = ByStartRank(alpha)
            return Method(Spectral(r), SmallNormal(), scale, Add(), rules=rules, dropout=config.dropout, full=full)
        if config.sort == "VeRA":
            init = Projections(config.seed, config.start, config.saved)
            frozen = Vectors.shared
            return Method(Vectors(r), init, Fixed(1.0), Add(), frozen=frozen, dropout=config.dropout, full=full)
        scale = BySqrtRank(alpha) if config.rslora else ByRank(alpha)
        join: Join = Direction() if config.sort == "DoRA" else Add()
        return Method(LowRank(r), Kaiming(), scale, join, dropout=config.dropout, full=full)

    def _values(self, usable: list[str], fulls: Fulls) -> dict[str, Tensor]:
        wanted = [*usable, *fulls.copies]
        raw = self.file.read(self.names[name] for name in wanted)
        values = {name: raw[self.names[name]] for name in wanted}
        self.findings.tolerable += [*not_finite(values), *absurd({n: values[n] for n in usable})]
        fulls.check_copies(values, self.findings)
        self.findings.settle()
        return values

    def _nothing(self) -> Problem:
        """Why there is no site at all."""
        if self.layers is None:
            return Problem(WEIGHTS, "holds no pair of factors of any module that `target_modules` names")
        tails = sorted({n.rpartition(".")[2] for n, layer in self.layers.items() if n and kind_of(layer) is not None})
        asked = self.config.targets if isinstance(self.config.targets, tuple) else ()
        near = [name for entry in asked[:5] for name in nearest(entry.rpartition(".")[2], tails, most=1)]
        fix = f"the nearest here are {', '.join(sorted(set(near)))}" if near else f"its layers: {', '.join(tails[:20])}"
        return Problem(f"{NAME}: target_modules", "names no layer of this model", fix)

    def _explain(self, name: str) -> str:
        key = peft_keys.parsed(name, self.config.sort)
        if name in peft_keys.BANKS.values() and not self.config.saved:
            return "is there, and the configuration says that it is drawn from its seed"
        if key is None:
            base = None if self.model is None else {n for n, _ in base_parameters(self.model)}
            return strange(name, self.config.sort, base)
        if self.layers is not None and key.site not in self.layers:
            return "adapts a module that the model does not have"
        try:
            targeted = self.config.targets_module(key.site)
        except ValueError as error:  # the patterns' budget
            return str(error)
        if not targeted:
            return "adapts a module that the configuration does not name"
        return "is a factor of another kind of layer than is there"


def _site_of_shapes(name: str, A: tuple[int, ...], B: tuple[int, ...], embedding: bool, transposed: bool) -> Site:
    """A site as far as the shapes of its two factors tell."""
    inp = int(torch.Size(A[1:]).numel())
    if embedding:
        return Site(name, "embedding", B[0], inp, bias=False)
    if len(A) == 2:
        return Site(name, "transposed" if transposed else "linear", B[0], inp, bias=False)
    return Site(name, f"conv{len(A) - 2}d", B[0], inp, bias=False, window=A[2:])


def _filled(p: Placed, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a site; where one is missing, zeros: no change there."""
    return {
        name: values[name] if name in values else torch.zeros(shape) for name, shape in peft_keys.layout(p).values()
    }
