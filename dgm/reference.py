"""Reference chains on disk: sampled once, and used again only where protocol, model and data are the same."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file

from . import __version__
from .chains import global_packing, sample_chains
from .data import as_given
from .digest import digest
from .drawn import Chains
from .errors import DataError, OptionError
from .log_joint import LogJoint
from .packing import Packing
from .programs import Program, preserved_rng
from .provenance import provenance
from .sites import latents
from .store import writable, write_whole

__all__ = ["reference"]

FORMAT = 1
DEFAULTS: dict[str, Any] = {
    "chains": 16, "warmup": 300, "draws": 200, "leapfrogs": 100, "thin": 1, "seed": 0, "init_scale": 0.5,
    "metric": "diagonal", "acceptance": 0.7,
}  # fmt: skip
"""Of `sample_chains`; what is not an argument of the draws (how they are computed) is no part of the protocol."""


def reference(
    model: Program,
    *data: Any,
    folder: str | os.PathLike[str],
    name: str = "reference",
    stale: Literal["refuse", "recompute"] = "refuse",
    compiled: bool | None = None,
    progress: Any = None,
    **protocol: Any,
) -> Chains:
    """Chains of `sample_chains`, from the folder where the same ones are there, else sampled and written to it.

    `<name>.json` holds the protocol (every setting and the seed), sha256 of the model's structure and of the data, the
    model's log density at two points, and what came out; it names the safetensors file with the draws and its sha256.
    The draws are written first and the JSON replaced last, each whole or not at all, so that a run that is killed
    leaves what was there. Both densities are compared to rounding, so that priors, frozen weights and activations
    count, but not where a network's initial weights happened to lie.

    Args:
        model, data: as of `sample_chains`.
        folder: made if need be. name: of the files.
        stale: what happens where a reference of this name is there but another one, or damaged: "refuse" raises,
            "recompute" replaces it.
        compiled, progress: as of `sample_chains`; no part of the protocol.
        protocol: settings of `sample_chains`: chains, warmup, draws, leapfrogs, thin, seed, init_scale, metric,
            acceptance.

    Raises:
        DataError: another protocol, model or data than those of the file, each difference named; or a damaged file.
        OptionError: an unknown setting, or a folder that cannot be written to; and as for `sample_chains`.

    >>> import tempfile
    >>> from dgm.models.bayesian_linear_regression import example
    >>> model, batch = example()
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     one, two = (
    ...         reference(model, *batch, folder=folder, chains=2, warmup=20, draws=5, leapfrogs=3) for _ in range(2)
    ...     )
    >>> torch.equal(one.draws, two.draws)
    True
    """
    unknown = sorted(set(protocol) - set(DEFAULTS))
    if unknown:
        raise OptionError(f"{unknown[0]!r} is no setting of the chains: expected some of {', '.join(DEFAULTS)}")
    if stale not in ("refuse", "recompute"):
        raise OptionError(f"stale is {stale!r}, expected 'refuse' or 'recompute'")
    folder, data = writable(Path(folder)), as_given(data)
    packing = global_packing(model, data)
    wanted = identity(model, packing, data, {**DEFAULTS, **protocol})
    path = folder / f"{name}.json"
    if path.is_file():
        try:
            content = _content(path)
            different = differences(content["identity"], wanted)
            if different:
                raise DataError(
                    f"{path} is of another run: {'; '.join(different)}. Give the same settings, another name or "
                    'folder, or stale="recompute" to replace it'
                )
            return _chains(path, content, model, packing)
        except DataError:
            if stale == "refuse":
                raise
    chains = sample_chains(model, *data, compiled=compiled, progress=progress, **{**DEFAULTS, **protocol})
    _save(path, chains, wanted)
    return chains


def identity(model: Program, packing: Packing, data: tuple[Any, ...], protocol: dict[str, Any]) -> dict[str, Any]:
    """What must be equal for draws to be the same: settings, model and data."""
    found = latents(model, *data)
    lines = [
        f"{site.name} {tuple(site.batch_shape)} {tuple(site.event_shape)} {site.support_name}"
        for site in found.values()
    ]
    for site, node in found.observed.items():
        lines.append(f"{site} observed {type(node['fn']).__name__} {tuple(node['value'].shape)}")
    joint = LogJoint(model, [packing])
    with preserved_rng(0), torch.no_grad():
        wave = torch.cos(torch.arange(joint.size, dtype=torch.float64)).to(packing.dtype)
        densities = [float(joint.whole(u, *data)) for u in (0.1 * wave, 0.3 * wave.flip(0))]
    return {
        "protocol": protocol,
        "model": hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        "data": digest(data),
        "density": densities,
    }


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Each field that differs, in words.

    >>> one = {"protocol": {"seed": 0}, "model": "a", "data": "b", "density": [1.0]}
    >>> differences(one, {**one, "protocol": {"seed": 1}})
    ['seed is 0 there and 1 here']
    """
    there, here = stored["protocol"], wanted["protocol"]
    out = [
        f"{key} is {there.get(key, 'missing')!r} there and {here.get(key, 'missing')!r} here"
        for key in sorted({*there, *here})
        if there.get(key, "missing") != here.get(key, "missing")
    ]
    out += [f"the {what} differ" for what in ("data",) if stored[what] != wanted[what]]
    if stored["model"] != wanted["model"]:
        out.append("the model's sites differ")
    pairs = zip(stored["density"], wanted["density"], strict=True)
    if not out and not all(a == b or math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-3) for a, b in pairs):
        out.append("the model's log density differs (a prior, a frozen weight, or the network)")
    return out


def _save(path: Path, chains: Chains, wanted: dict[str, Any]) -> None:
    held = {name: getattr(chains, name) for name in TENSORS}
    key = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:12]
    file = path.with_name(f"{path.stem}-{key}-{os.getpid()}.safetensors")  # never the one that the present JSON names
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in held.items()}
    write_whole(file, lambda part: save_file(stored, part))
    rhat, ess = chains.prediction_rhat, chains.prediction_ess
    content = {
        "format": FORMAT,
        "dgm": __version__,
        "identity": wanted,
        "file": file.name,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        **{name: getattr(chains, name) for name in NUMBERS},
        "prediction_rhat_max": float(rhat.max()) if len(rhat) else None,
        "prediction_ess_min": float(ess.min()) if len(ess) else None,
        "verdict": chains.verdict,
        **provenance(),
    }
    text = json.dumps(content, indent=1)
    write_whole(path, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    for other in path.parent.glob(f"{path.stem}-*.safetensors"):
        if other != file and _is_draws(other, path):
            other.unlink(missing_ok=True)


TENSORS = ("draws", "log_density", "step", "acceptance", "prediction_rhat", "prediction_ess")
NUMBERS = ("divergences", "gradients", "seconds")


def _is_draws(file: Path, path: Path) -> bool:
    """Whether a file is `<name>-<12 hex digits>-<number>.safetensors` of this very name."""
    parts = file.stem.removeprefix(f"{path.stem}-").split("-")
    return len(parts) == 2 and len(parts[0]) == 12 and parts[1].isdigit()


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = {"format", "identity", "file", "sha256", *NUMBERS} - set(content)
        if missing:
            raise KeyError(sorted(missing)[0])
        if not {"protocol", "model", "data", "density"} <= set(content["identity"]):
            raise KeyError("identity")
        if content["format"] > FORMAT or Path(content["file"]).name != content["file"]:
            raise ValueError("of another format")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f'{path} is damaged: {error}; remove it, or give stale="recompute"') from error
    return content


def _chains(path: Path, content: dict[str, Any], model: Program, packing: Packing) -> Chains:
    file = path.with_name(content["file"])
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f'{file}, which {path.name} names, is missing; give stale="recompute"') from error
    found = hashlib.sha256(raw).hexdigest()
    if found != content["sha256"]:
        raise DataError(
            f"{file} is damaged: {len(raw)} bytes with sha256 {found[:12]}, expected {content['sha256'][:12]}; remove "
            'it, or give stale="recompute"'
        )
    try:
        held: dict[str, Any] = dict(load(raw))
        return Chains(model, packing, **{k: held[k] for k in TENSORS}, **{k: content[k] for k in NUMBERS})
    except (SafetensorError, KeyError) as error:
        raise DataError(f'{file} is damaged: {error}; remove it, or give stale="recompute"') from error
