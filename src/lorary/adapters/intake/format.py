"""The interface of an adapter format: which files are a tool's, and the adapter in one."""

from __future__ import annotations

from typing import Protocol

from lorary.adapters.adapter import Adapter
from lorary.adapters.peft.config import PeftConfig
from lorary.files.findings import Findings
from lorary.files.tensor_file import Header, TensorSource
from lorary.model.base import Base


class Format(Protocol):
    """The adapter files of a tool.

    Attributes:
        title: the tool, in messages.
    """

    title: str

    def recognises(self, header: Header) -> bool:
        """Whether a file with this header is this tool's."""
        ...

    def read(self, file: TensorSource, base: Base | None, config: PeftConfig | None, findings: Findings) -> Adapter:
        """The adapter in a file.

        Args:
            file: the open file.
            base: the base, if at hand.
            config: the configuration beside the file, if there is one.
            findings: collects the problems, and raises them.

        Raises:
            FileError: every reason why it cannot be used.
        """
        ...
