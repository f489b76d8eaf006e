"""A training run in which a method decides, step by step, which weights are zero.

Everything hangs on hooks of the optimiser and of the weights' gradients, so that the loop of the user, whatever it
does between two steps (accumulating, clipping, scaling, averaging), stays as it was. Masks are kept at one bit a
weight; that they hold is not left to the optimiser.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.core.masks import MaskSet, pack_bits
from gossamer.core.optimizer_state import KEEP_ZEROS
from gossamer.core.projected_weight import ProjectedWeight
from gossamer.core.ranks import average_, ranks
from gossamer.core.sparse_sites import MaskedWeight, Site, StoredNonzeros
from gossamer.core.sparsifier import Phase, Sparsifier, random_masks
from gossamer.core.targets import Target
from gossamer.core.topology import Topology
from gossamer.errors import CheckpointError, ConfigurationError

_FOLLOWED: WeakIdKeyDictionary = WeakIdKeyDictionary()


class SparseTraining(Topology):
    """What :meth:`gossamer.core.sparsifier.Sparsifier.attach` returns.

    Attributes
    ----------
    method, model, optimizer
        What runs.
    extra
        What the method itself wants to remember: numbers and tensors; saved with the run.
    notes
        What the method could not do as it was asked, a sentence each.

    Steps count from the moment the method was attached; those that a gradient scaler skips do not count.
    """

    def __init__(
        self,
        method: Sparsifier,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any] | None = None,
    ):
        targets = method.targets(model)
        check_free(targets, optimizer)
        self.method, self.model = method, model
        super().__init__(targets, optimizer, method.seed)
        self.extra: dict[str, Any] = {}
        self.notes: list[str] = []
        for site in self._sites.values():
            _FOLLOWED[site.parameter] = self
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            optimizer.register_load_state_dict_post_hook(self._memory_loaded),
        ]
        self._moves_zeros = type(optimizer) not in KEEP_ZEROS
        self._clean = False
        self._attached = True
        try:
            if state is None:
                method.start(self)
            else:
                self.load_state_dict(state)
        except BaseException:
            self._release()
            raise
        for note in self.notes:
            warnings.warn(note, stacklevel=3)
        if state is None:
            self._record()
            self._prepare()

    def _make_site(self, name: str, targets: list[Target]) -> Site:
        return self.method.site(name, targets) or super()._make_site(name, targets)

    @property
    def phase(self) -> Phase:
        """What the method is doing: warm-up, ramp, explore or frozen."""
        return self.method.phase(self.step)

    # ------------------------------------------------------------------------------------------ hooks

    def _memory_loaded(self, *_: Any) -> None:
        self._clean = False

    def _before_step(self, optimizer: torch.optim.Optimizer, arguments: tuple, named: dict[str, Any]) -> None:
        closure = named.get("closure", arguments[1] if len(arguments) > 1 else None)
        if closure is not None and self.projected():
            raise ConfigurationError(
                f"{type(self.method).__name__} cannot follow a step with a closure, which would run the model while "
                f"its weights are dense; call backward() before step()"
            )
        if not self._clean:  # by now masks are loaded as well, in whatever order that was done
            for site in self._sites.values():
                site.forget(self.optimizer)
            self._clean = True
        # whatever averages gradients over ranks writes to them after they have been masked
        if ranks() > 1:
            for site in self._sites.values():
                if isinstance(site, MaskedWeight):
                    site.mask_gradient()
        for site in self._sites.values():
            site.restore()
        self.method.prepare(self)

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        for site in self._sites.values():
            site.hold(self._moves_zeros)
        if ranks() > 1 and self.method.wants_gradient(self.step):
            for site in self._sites.values():
                gradient = site.gradient()
                if gradient is not None and not isinstance(site, ProjectedWeight):  # which is averaged with all others
                    average_(gradient)
        self.method.change(self)
        for site in self._sites.values():
            site.settle()
        self._prepare()

    def _prepare(self) -> None:
        wanted = self.method.wants_gradient(self.step + 1)
        for site in self._sites.values():
            site.collect(wanted)

    def projected(self) -> dict[str, ProjectedWeight]:
        """Parameters of which the model computes with a part, by name."""
        return {name: site for name, site in self._sites.items() if isinstance(site, ProjectedWeight)}

    @contextmanager
    def dense_weights(self) -> Iterator[None]:
        """For the length of a block, let the model hold the dense weights that train, not the part it computes with.

        An average over the steps is one of dense weights if it is updated within; :meth:`finalize` gives it the zeros.
        """
        self._check_attached()
        for site in self._sites.values():
            site.restore()
        try:
            yield
        finally:
            for site in self._sites.values():
                site.settle()

    # ------------------------------------------------------------------------------------------ beginning, end

    def start_at_random(self, sparsity: float, allocation: str) -> None:
        """Draw the first masks, and note what the allocation could not do; see :func:`random_masks`."""
        masks, notes = random_masks(self.targets.values(), sparsity, allocation, self.generator)
        self.notes.extend(notes)
        self.assign(masks)

    def state_dict(self) -> dict[str, Any]:
        """Everything from which a run goes on exactly as if it had not stopped, besides model and optimiser."""
        return {
            "method": type(self.method).__name__,
            "step": self.step,
            "masks": self.masks.state_dict(),
            "generator": self.generator.get_state(),
            "extra": dict(self.extra),
            "history": list(self.history),
            "dense": {name: site.state() for name, site in self.projected().items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a run stopped; load the model and the optimiser as well, in any order.

        Raises
        ------
        CheckpointError
            If the state is of another method or model, or damaged; nothing is changed then.
        """
        missing = {"method", "step", "masks", "generator", "extra", "history"} - set(state)
        if missing:
            raise CheckpointError(f"the state lacks {sorted(missing)[0]!r}; it is no state of a sparse training run")
        attached = type(self.method).__name__
        if state["method"] != attached:
            raise CheckpointError(
                f"the state is of {state['method']}, and {attached} is attached; attach the same method"
            )
        masks = MaskSet.from_state_dict(state["masks"])
        shapes = {name: site.shape for name, site in self._sites.items()}
        if masks.shapes != shapes:
            name = sorted(set(masks.shapes.items()) ^ set(shapes.items()))[0][0]
            raise CheckpointError(
                f"the state covers other weights than the model has, first {name!r}; it is of another model"
            )
        try:
            step, extra = int(state["step"]), dict(state["extra"])
            history = [(int(at), int(active)) for at, active in state["history"]]
            self.generator.set_state(state["generator"])
        except (TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the state of the sparse training run is damaged: {error}") from error
        dense = state.get("dense", {})
        if self.projected().keys() != dense.keys():
            raise CheckpointError("the state does not hold the dense weights that this method trains; it is of another")
        self.step, self.extra, self.history = step, extra, history
        for name, site in self._sites.items():
            if isinstance(site, ProjectedWeight):
                site.load_state(dense[name])
            elif not torch.equal(site.bits.cpu(), pack_bits(masks[name])):
                site.assign(masks[name], None)  # its memory may have been loaded already
        self._prepare()

    def finalize(self, *copies: nn.Module) -> MaskSet:
        """End: the method finishes, every hook goes, and the model is a plain one with zeros in its weights.

        Parameters
        ----------
        copies
            Other models of the same shape that get the same zeros, such as an average over the steps.

        Returns
        -------
        MaskSet
            What remains.
        """
        self._check_attached()
        self.method.finish(self)
        self._release()
        masks = self.masks
        for name, site in self._sites.items():
            if isinstance(site, StoredNonzeros):
                _replace(self.model, name.rpartition(".")[0], site.layer.to_dense())
        for copy in copies:
            masks.apply_(copy)
        return masks

    def _check_attached(self) -> None:
        if not self._attached:
            raise ConfigurationError("this run has been finalized already; attach the method again to go on")

    def _release(self) -> None:
        self._attached = False
        for handle in self._handles:
            handle.remove()
        for site in self._sites.values():
            site.release()
            _FOLLOWED.pop(site.parameter, None)


def check_free(targets: Iterable[Target], optimizer: torch.optim.Optimizer) -> None:
    """Refuse weights that a method cannot follow.

    Raises
    ------
    ConfigurationError
        If one is frozen, not in the optimiser, or already followed.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for target in targets:
        name, parameter = target.name, target.parameter
        if not parameter.requires_grad:
            raise ConfigurationError(f"{name} has requires_grad=False and cannot train; exclude it or unfreeze it")
        if id(parameter) not in held:
            raise ConfigurationError(f"{name} is not in the optimizer; give that of this model, or exclude it")
        if parameter in _FOLLOWED:
            follower = type(_FOLLOWED[parameter].method).__name__
            raise ConfigurationError(f"{name} is already followed by {follower}; finalize() that first")


def _replace(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)
