"""The reader of PEFT's adapter folders, which checks every tensor's name and shape before it reads any.

With a model, the sites are the modules that PEFT would adapt in it, and each must have its tensors in the file. Without
one, they are the modules that the file has factors for; shapes do not tell GPT-2's Conv1D from a linear layer, nor
whether a layer has a bias.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from lorary.adapters.adapter import Adapter
from lorary.adapters.intake.format import Format
from lorary.adapters.peft import attention, keys
from lorary.adapters.peft.config import NAME, PeftConfig, read_config
from lorary.adapters.peft.experts import experts_named, from_file, order_columns
from lorary.adapters.peft.modules_to_save import modules_to_save
from lorary.adapters.peft.per_expert import PerExpert
from lorary.adapters.peft.routers import Routers
from lorary.adapters.peft.token_rows import row_sites
from lorary.adapters.peft.translate import translate
from lorary.adapters.peft.types import PEFT_TYPES
from lorary.adapters.peft.virtual_tokens import FIELDS, read_virtual_tokens
from lorary.adapters.shared_tensors import regenerate, rejoined
from lorary.adapters.tensor_checks import Layout, alert_if_zero, expected_tensors, read_tensors, site_tensors
from lorary.errors import Diagnostic, FileError, nearest
from lorary.files.findings import Findings
from lorary.files.safe_open import read_json
from lorary.files.tensor_file import TensorFile
from lorary.layers.adapted import base_parameters
from lorary.model.base import Base
from lorary.model.fingerprint import Fingerprint, base_name
from lorary.model.reach.bypass import Bypass
from lorary.model.vocabulary import why_other_vocabulary
from lorary.spec.placement import AdaptedSite, shared_shapes
from lorary.spec.site import Site

WEIGHTS = "adapter_model.safetensors"
MOST_JSON = 4 * 2**20


def read_peft(
    folder: Path,
    base: Base | None,
    findings: Findings,
    others: Iterable[Format] = (),
    expert_layout: str | None = None,
) -> Adapter:
    """The adapter that PEFT saved in `folder`, or a tool that writes PEFT's configuration beside names of its own.

    Args:
        folder: a resolved folder.
        base: the base, if at hand.
        findings: collects the problems, and raises them.
        others: the formats of such tools.
        expert_layout: the order of `lora_B` of fused experts, if the caller knows it.

    Raises:
        FileError: every reason why it cannot be used.
    """
    config = None
    with findings.gathering(NAME):
        types = {name: peft_type.fields for name, peft_type in PEFT_TYPES.items()} | FIELDS
        config = read_config(read_json(folder, NAME, MOST_JSON), types, findings)
    with TensorFile(folder, weights_name(folder)) as file:
        if config is None or findings.fatal:  # problems that follow from a wrong configuration would mislead
            raise FileError("")
        if config.peft_type in FIELDS:
            return read_virtual_tokens(config, base, findings, file)
        for other in others:
            if other.recognises(file.header):
                findings.notes.append(f"read from the names of {other.title}")
                return other.read(file, base, config, findings)
        return _Reader(config, base, findings, file, expert_layout).adapter()


def weights_name(folder: Path) -> str:
    """The name of the tensor file.

    Raises:
        FileError: there is only a pickle, which is never opened.
    """
    pickles = [n for n in ("adapter_model.bin", "adapter_model.pt") if (folder / n).exists()]
    if pickles and not (folder / WEIGHTS).exists():
        fix = "if you trust its author, load it with PEFT and save it again: PEFT writes safetensors"
        what = "is a pickle, which can run code when it is read; it was not opened"
        raise FileError("", [Diagnostic(pickles[0], what, fix)])
    return WEIGHTS


class _Reader:
    """The reading of one folder."""

    def __init__(
        self, config: PeftConfig, base: Base | None, findings: Findings, file: TensorFile, expert_layout: str | None
    ) -> None:
        self.config, self.findings, self.file, self.expert_layout = config, findings, file, expert_layout
        self.type = PEFT_TYPES[config.peft_type]
        self.base = base
        self.leaves = self.type.leaves_of(config)
        translation = translate(file.header.tensors, self.leaves, self.type.canonical_name, base)
        findings.fatal += translation.problems
        findings.notes += translation.notes
        if translation.ambiguous:
            raise FileError("", translation.ambiguous.values())
        self.attentions = attention.attentions_in(translation.names)
        names = attention.from_file(translation.names, self.attentions)
        self.names, self.inner = from_file(names, experts_named(config, base, findings)), translation.inner
        self.found = {short: file.header.tensors[name] for short, name in self.names.items()}

    def adapter(self) -> Adapter:
        """The adapter, or a FileError with every reason why it cannot be used."""
        findings, config = self.findings, self.config
        if self.base is not None and (other := why_other_vocabulary(self.base, self._vocabularies())):
            raise FileError("", other)
        sites = self._sites()
        single = PerExpert(self.config, self.type, self.base, self.found, findings)
        what = "has factors of its own in this file, and factors of single experts too"
        findings.fatal += [Diagnostic(a.site.name, what) for a in sites if a.site.name in single.sites]
        saved = modules_to_save(self.config, self.base, {a.site.name for a in sites}, self.found, findings)
        stored = all(adapted.init.store_shared for adapted in sites)
        expected, vital = expected_tensors(sites, self._layout, self.type.shared if stored else {})
        if not sites and not single.sites and not findings.fatal:
            findings.fatal.append(self._no_sites())
        copies = {name: self.found[name].shape for name in [*saved.copies, *saved.kept]}
        base = saved.expected | copies
        routers = Routers(self.config, self.type, self.base, self.found)
        findings.fatal += routers.problems()
        wanted = expected | single.expected | routers.expected | base
        values = read_tensors(self.file, self.names, wanted, findings, self._explain, vital, base)
        order_columns([a.site for a in sites], values, config.values, self.expert_layout, findings)
        saved.check_copies(values, findings)
        findings.raise_refused()
        findings.notes += routers.notes() + single.notes() + attention.notes(self.attentions)
        shared = self._shared(sites, values, stored)
        tensors = site_tensors(sites, values, expected, self.type.decode, shared, findings)
        tensors, differing = rejoined(sites, tensors)
        findings.fatal += differing
        tensors |= single.tensors(values)
        sites += tuple(single.sites.values())
        full = saved.values(values, findings) | routers.weights(values)
        alert_if_zero(sites, tensors, findings)
        method = self.type.to_method(self.config)
        method = method.replace(full=tuple(full)) if full else method  # a new one is checked as a whole
        fingerprint = Fingerprint(name=base_name(self.config["base_model_name_or_path"]))
        return Adapter(method, sites, tensors, full, fingerprint, findings.conclude())

    def _vocabularies(self) -> dict[str, int]:
        """Path -> the number of tokens in the file's tensors there: tables, and factors with a row for each token."""
        dims = {"base_layer.weight": 0, "weight": 0, "lora_embedding_A": 1, "lora_B.weight": 0}
        return {
            name.removesuffix(f".{leaf}"): entry.shape[dim]
            for leaf, dim in reversed(dims.items())
            for name, entry in self.found.items()
            if name.endswith(f".{leaf}") and len(entry.shape) == 2
        }

    def _layout(self, adapted: AdaptedSite) -> Layout:
        """The layout of a site's own tensors, with the file's shapes where they mean the same."""
        layout = self.type.layout(adapted)
        for role, (name, shape) in layout.items():
            if name in self.found:
                found = self.found[name].shape
                if found == shape:
                    continue
                layout[role] = name, found  # so that a refused shape is reported once
                with self.findings.gathering():
                    layout[role] = name, self.type.read_shape(adapted, role, shape, found)
        return layout

    def _shared(self, sites: tuple[AdaptedSite, ...], values: Mapping[str, Tensor], stored: bool) -> dict[str, Tensor]:
        """role -> what the sites share, from the file or regenerated."""
        roles = shared_shapes(sites)
        if stored:
            return {role: values[self.type.shared[role]] for role in roles}
        names = ", ".join(self.type.shared.values())
        self.findings.notes.append(f"the file has no {names}: drawn by {sites[0].init}")
        return regenerate(sites, dict.fromkeys(roles, torch.float32))

    def _sites(self) -> tuple[AdaptedSite, ...]:
        if not self.type.factors and not self.type.rows_alone and self.base is None:
            what = f"the shapes of the layers that PEFT's {self.type.title} adapts are known only to the model"
            self.findings.fatal.append(Diagnostic("", what, "read it onto its base: lorary.load(model, folder)"))
            self.findings.raise_refused()
        try:
            sites = list(self._sites_of_file() if self.base is None else self._sites_of_base(self.base))
            mismatches = self.type.site_mismatches(self.config, {s.name for s in sites})
            adapted = [AdaptedSite(s, self.type.to_method(self.config, self._named(s.name))) for s in sites]
            computed = ((a.site.name, self.type.why_another_function(a)) for a in adapted)
            self.findings.fatal += [Diagnostic(name, why) for name, why in computed if why]
            adapted += row_sites(self.config, self.base, self.found, self.findings)
        except ValueError as error:  # the patterns' budget, which the later checks would need too
            self.findings.fatal.append(Diagnostic(NAME, str(error)))
            raise FileError("") from None
        problems = [Diagnostic(f"{NAME}: {field}", what) for field, what in mismatches]
        problems += [Diagnostic(a.site.name, what) for a in adapted for what in a.delta.problems(a.site.one)]
        if problems:
            self.findings.fatal += problems
            self.findings.raise_refused()
        order = {name: i for i, name in enumerate(self.base.kinds if self.base is not None else ())}
        return tuple(sorted(adapted, key=lambda a: order.get(a.site.name, 0)))

    def _sites_of_base(self, base: Base) -> Iterator[Site]:
        if self.type.rows_alone:
            return
        in_file = self._sites_in_names() if self.config["target_modules"] is None else base.kinds
        for name in base.kinds:
            if not name or name not in in_file or not self._targeted(name):
                continue
            found = base.site(name)
            owner = name.rpartition(".")[0]
            if owner not in self.attentions and isinstance(base.modules.get(owner), nn.MultiheadAttention):
                what = str(Bypass("nn.MultiheadAttention", called=False))
                self.findings.fatal.append(Diagnostic(name, what))
            elif self.config.targets_parameter(f"{name}.weight") and found.kind != "linear":
                what = f"is of kind {found.kind}, and only linear layers are read from `target_parameters`"
                self.findings.fatal.append(Diagnostic(name, what))
            elif what := self.type.why_not_adaptable(found, base.modules[name]):
                fix = "it can neither be merged nor read here" if found.kind.startswith("conv") else ""
                self.findings.fatal.append(Diagnostic(name, what, fix))
            else:
                yield found

    def _targeted(self, site: str) -> bool:
        """Whether PEFT adapts the layer of this name; with `ensure_weight_tying` the tied ones as well."""
        if self.base is not None and self.base.kinds.get(site) == "experts":
            return self.config.targets_parameter(site)
        if self.config.targets_module(self._named(site)):
            return True
        if not self.config.values.get("ensure_weight_tying") or site not in self._sites_in_names():
            return False
        first = {} if self.base is None else self.base.first_names
        weight = first.get(f"{site}.weight")
        return weight is None or any(
            self.config.targets_module(tied.removesuffix(".weight")) for tied, one in first.items() if one == weight
        )

    def _named(self, site: str) -> str:
        """The name of a site in the configuration."""
        owner = site.rpartition(".")[0]
        site = owner if owner in self.attentions else site
        return self.inner.get(site, site)

    def _sites_in_names(self) -> dict[str, None]:
        """The sites in the names of the tensors, in the file's order."""
        sites = (keys.site_of(name, self.leaves) for name in self.found)
        return dict.fromkeys(name for name in sites if name is not None)

    def _sites_of_file(self) -> Iterator[Site]:
        if self.type.rows_alone:
            return
        for name in self._sites_in_names():
            if not name or not self._targeted(name):
                continue
            pairs = [[f"{name}.{leaf}" for leaf in leaves] for leaves in self.type.factors]
            pair = next((names for names in pairs if names[0] in self.found), pairs[-1])
            missing = [n for n in pair if n not in self.found]
            if missing:
                self.findings.tolerable.append(Diagnostic(missing[0], "is missing, and its partner is useless alone"))
                for n in set(pair) - set(missing):
                    del self.found[n], self.names[n]
                continue
            A, B = (self.found[n].shape for n in pair)
            if len(A) not in (2, 3, 4, 5) or len(B) != len(A):
                what = f"has the shape {list(A)} and its partner {list(B)}: no layer has such factors"
                self.findings.fatal.append(Diagnostic(pair[0], what))
                continue
            found = site_of_shapes(name, A, B, "embedding" in pair[0][len(name) :], self.config["fan_in_fan_out"])
            yield attention.projection(found, self.attentions)

    def _no_sites(self) -> Diagnostic:
        """Why no layer is adapted at all."""
        if self.base is None:
            return Diagnostic(WEIGHTS, "holds no pair of factors of any module that `target_modules` names")
        endings = sorted({name.rpartition(".")[2] for name in self.base.kinds if name})
        asked = self.config["target_modules"] if isinstance(self.config["target_modules"], tuple) else ()
        near = [name for entry in asked[:5] for name in nearest(entry.rpartition(".")[2], endings, most=1)]
        layers = f"its layers: {', '.join(endings[:20])}"
        fix = f"the nearest here are {', '.join(sorted(set(near)))}" if near else layers
        return Diagnostic(f"{NAME}: target_modules", "names no layer of this model", fix)

    def _explain(self, name: str) -> str:
        """An unexpected tensor, described."""
        at = keys.site_of(name, self.leaves)
        if name in self.type.shared.values():
            return "is there, and the configuration says that it is drawn from its seed"
        if at is None:
            base = None if self.base is None else {n for n, _ in base_parameters(self.base.model)}
            return keys.why_unexpected(name, self.type, base)
        if self.base is not None and at not in self.base.modules:
            return "adapts a module that the model does not have"
        try:
            targeted = self._targeted(at)
        except ValueError as error:  # the patterns' budget
            return str(error)
        if not targeted:
            return "adapts a module that the configuration does not name"
        return "is a factor of another kind of layer than is there"


def site_of_shapes(name: str, A: tuple[int, ...], B: tuple[int, ...], embedding: bool, transposed: bool) -> Site:
    """The site that the shapes of its two factors imply."""
    kind = f"conv{len(A) - 2}d" if len(A) > 2 else "transposed" if transposed else "linear"
    kind = "embedding" if embedding else kind
    return Site(name, kind, B[0], math.prod(A[1:]), bias=False, kernel_size=() if embedding else A[2:])
