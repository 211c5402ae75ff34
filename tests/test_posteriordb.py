"""posteriordb's posteriors: reading, the programs against the reference draws by Stein's identity, and the suite."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from dgm.benchmarks import posteriordb, posteriordb_models
from dgm.benchmarks.posteriordb_data import Posterior, load, names
from dgm.benchmarks.posteriordb_models import Values
from dgm.benchmarks.posteriordb_rows import Settings, agreement, nuts_row, rows_of
from dgm.benchmarks.posteriordb_series import log_path, log_product, recursion
from dgm.benchmarks.posteriordb_start import coordinates, find_start, whitened
from dgm.errors import DataError, OptionError
from dgm.log_joint import LogJoint
from dgm.packing import Packing
from dgm.programs import isolated
from dgm.sites import latents

FOLDER = Path(os.environ.get("DGM_DATA", ".")) / "posteriordb"

ALL = {
    "arK-arK": 7,
    "arma-arma11": 4,
    "bball_drive_event_0-hmm_drive_0": 6,
    "earnings-logearn_interaction": 5,
    "eight_schools-eight_schools_centered": 10,
    "eight_schools-eight_schools_noncentered": 10,
    "garch-garch11": 4,
    "gp_pois_regr-gp_pois_regr": 13,
    "hudson_lynx_hare-lotka_volterra": 8,
    "kidiq-kidscore_interaction": 5,
    "kidiq-kidscore_momiq": 3,
    "kilpisjarvi_mod-kilpisjarvi": 3,
    "low_dim_gauss_mix-low_dim_gauss_mix": 5,
    "mesquite-logmesquite_logvas": 8,
    "nes1972-nes": 10,
    "sblrc-blr": 6,
}
"""Unconstrained latents of each."""

CENTERED = "eight_schools-eight_schools_centered"

needs_folder = pytest.mark.skipif(
    not (FOLDER / "posteriors").is_dir(), reason="DGM_DATA names no folder with posteriordb in it"
)


def unconstrained(posterior: Posterior, every: int = 1) -> tuple[LogJoint, Tensor]:
    """The program's density, and the reference draws in its coordinates, `(S, d)`."""
    found = latents(posterior.model.program, *posterior.model.batch)
    packing = Packing(found.values())
    values = posterior.model.to_latents(posterior.values(posterior.reference[::every]))
    return LogJoint(posterior.model.program, [packing]), packing.pack({name: values[name] for name in found})


def stein(posterior: Posterior, shift: Any = None, every: int = 5) -> tuple[float, float]:
    """Largest |z| of E[d log p / du_i] = 0, and of E[(u_i - m_i) d log p / du_j] = -[i = j], over reference draws.

    Both hold for draws of p alone. `shift(u)` is a term added to the density: what a mutant gets wrong.
    """
    joint, u = unconstrained(posterior, every)

    def density(w: Tensor) -> Tensor:
        value = joint.whole(w, *posterior.model.batch)
        return value if shift is None else value + shift(w, joint)

    slope = torch.func.vmap(torch.func.grad(density), chunk_size=500)(u)
    first = slope.mean(0) / (slope.std(0) / len(u) ** 0.5)
    cross = (u - u.mean(0))[:, :, None] * slope[:, None, :] + torch.eye(u.shape[1], dtype=u.dtype)
    second = cross.mean(0) / (cross.std(0) / len(u) ** 0.5)
    return float(first.abs().max()), float(second.abs().max())


# ------------------------------------------------------------------------------------------------- the programs


@needs_folder
def test_all_sixteen_are_there() -> None:
    assert set(ALL) <= set(names(FOLDER))


@needs_folder
@pytest.mark.parametrize("name", [name for name in ALL if name != CENTERED])
def test_reference_draws_are_draws_of_the_program(name: str) -> None:
    posterior = load(name, FOLDER)
    first, second = stein(posterior)
    assert first < 4.5 and second < 4.5


@needs_folder
@pytest.mark.parametrize("name", ALL)
def test_latents_and_parameters_are_each_others_inverse(name: str) -> None:
    posterior = load(name, FOLDER)
    joint, u = unconstrained(posterior, every=100)
    assert u.shape == (100, ALL[name]) and u.dtype == torch.float64
    assert len({len(item) for item in posterior.model.batch}) == 1  # rows of one data set, as dgm.fit takes them
    back = posterior.matrix(joint.packings[0].unpack(u)[0])
    assert back.shape == (100, len(posterior.names))
    torch.testing.assert_close(back, posterior.reference[::100], rtol=1e-6, atol=1e-6)


@needs_folder
def test_centred_and_non_centred_schools_are_one_posterior() -> None:
    """p(theta, mu, log tau) tau^8 = p(z, mu, log tau): the reference of one is that of the other.

    Stein's identity is no test of the centred program: its gradient goes as 1 / tau and has no variance.
    """
    one, two = load(CENTERED, FOLDER), load("eight_schools-eight_schools_noncentered", FOLDER)
    values = []
    for posterior in (one, two):
        joint, u = unconstrained(posterior, every=50)
        values.append(torch.func.vmap(lambda w, j=joint, p=posterior: j.whole(w, *p.model.batch))(u))
    log_tau = one.values(one.reference[::50])["tau"].log()
    difference = values[0] + 8 * log_tau - values[1]
    assert float(difference.std()) < 1e-8
    assert float((values[0] - values[1]).std()) > 1  # without the Jacobian they differ


def _tail(name: str, factor: float) -> Any:
    """log density of a site's value times -factor / 2: another scale of its prior."""

    def shift(u: Tensor, joint: LogJoint) -> Tensor:
        return -0.5 * factor * joint.values(u)[0][name].square().sum()

    return shift


def _jacobian(u: Tensor, joint: LogJoint) -> Tensor:
    return -joint.values(u)[1]


@needs_folder
@pytest.mark.parametrize(
    "name, mutant",
    [
        ("eight_schools-eight_schools_noncentered", _tail("mu", 1 / 4**2 - 1 / 5**2)),  # mu ~ N(0, 4)
        ("eight_schools-eight_schools_noncentered", _jacobian),
        ("mesquite-logmesquite_logvas", _jacobian),
        ("garch-garch11", _jacobian),
        ("bball_drive_event_0-hmm_drive_0", _jacobian),
        ("low_dim_gauss_mix-low_dim_gauss_mix", _tail("mu", 50.0)),
        ("arma-arma11", _tail("phi", 5.0)),
    ],
)
def test_a_wrong_program_fails(name: str, mutant: Any) -> None:
    assert max(stein(load(name, FOLDER), mutant, every=2)) > 5


@needs_folder
def test_stock_pyro_finds_a_start_at_a_flat_prior() -> None:
    model = load("kidiq-kidscore_momiq", FOLDER).model
    with isolated():
        assert AutoNormal(model.program)(*model.batch)["beta"].shape == (2,)


def test_recursions_are_those_of_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    r, c = torch.randn(13, generator=generator).double(), torch.tensor(-0.7).double()
    x = [r[0]]
    for term in r[1:]:
        x.append(term + c * x[-1])
    torch.testing.assert_close(recursion(r, c), torch.stack(x))
    m = torch.rand(7, 3, 3, generator=generator).double()
    torch.testing.assert_close(log_product(m.log()).exp(), torch.linalg.multi_dot(list(m)))


@needs_folder
def test_the_integrator_has_converged() -> None:
    """Against a grid sixteen times finer: far below the noise of 0.25 on the logarithm; one step a year is not."""
    posterior = load("hudson_lynx_hare-lotka_volterra", FOLDER)
    v: Values = posterior.values(posterior.reference[::500])
    times = [float(t) for t in range(21)]

    def paths(substeps: int) -> Tensor:
        return torch.func.vmap(lambda theta, z: log_path(theta, z.log(), times, substeps))(v["theta"], v["z_init"])

    fine = paths(64)
    assert float((paths(4) - fine).abs().max()) < 5e-4
    assert float((paths(1) - fine).abs().max()) > 5e-3


# ---------------------------------------------------------------------------------------------------- the start


@needs_folder
def test_the_start_is_the_mode_and_the_funnel_has_none() -> None:
    posterior = load("kidiq-kidscore_interaction", FOLDER)
    start = find_start(posterior.model)
    _, u = unconstrained(posterior)
    assert start.found
    assert float(((start.loc - u.mean(0)) / u.std(0)).abs().max()) < 0.25
    assert float((start.scale / u.std(0)).log().abs().max()) < 0.05
    assert not find_start(load(CENTERED, FOLDER).model, tries=2, iterations=50).found


@needs_folder
@pytest.mark.parametrize("full", [False, True])
def test_whitening_changes_the_coordinates_alone(full: bool) -> None:
    """log p(v) - log p(u) = log |S|, and draws come back as they went."""
    posterior = load("kidiq-kidscore_momiq", FOLDER)
    start = find_start(posterior.model)
    program = whitened(posterior.model, start, full=full)
    joint = LogJoint(program, [Packing(latents(program, *posterior.model.batch).values())])
    before, u = unconstrained(posterior, every=500)
    factor = torch.linalg.cholesky(start.covariance) if full else start.scale.diag()
    v = torch.linalg.solve(factor, (u - start.loc).mT).mT
    batch = posterior.model.batch
    difference = [joint.whole(one, *batch) - before.whole(two, *batch) for one, two in zip(v, u, strict=True)]
    torch.testing.assert_close(torch.stack(difference), factor.logdet().expand(len(v)))
    drawn = posterior.matrix(dict(coordinates(start, v, full=full)))
    torch.testing.assert_close(drawn, posterior.reference[::500])


# ----------------------------------------------------------------------------------------------------- the suite


@pytest.mark.slow
@needs_folder
def test_the_suite_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full normal right, mean field too narrow by what theory says: 1 / sqrt(precision_ii) of a normal posterior."""
    file, name = tmp_path / "rows.json", "kidiq-kidscore_interaction"
    words = ["--quick", "--posteriors", name, "--guides", "diagonal-normal;full-normal;Laplace", "--steps", "800"]
    posteriordb.main([*words, "--folder", str(FOLDER), "--out", str(file)])
    record = json.loads(file.read_text())
    assert {"rows", "checks", "settings", "provenance"} <= set(record)
    rows = {row["guide"]: row for row in record["rows"]}
    assert all(row["status"] == "ok" for row in rows.values())
    for guide in ("full-normal", "Laplace"):
        assert rows[guide]["mean_error"] < 0.35 and 0.85 < rows[guide]["sd_ratio_least"]
    start = find_start(load(name, FOLDER).model)
    expected = (torch.linalg.inv(start.covariance).diagonal().rsqrt() / start.scale).min()
    assert abs(rows["diagonal-normal"]["sd_ratio_least"] / float(expected) - 1) < 0.3
    assert rows["diagonal-normal"]["sd_ratio_least"] < 0.6
    assert rows["diagonal-normal"]["mmd2"] > rows["full-normal"]["mmd2"] + 3 * rows["full-normal"]["mmd2_floor_sd"]
    assert rows["diagonal-normal"]["elbo"] < rows["full-normal"]["elbo"] - 3
    assert "full-normal" in capsys.readouterr().out


@needs_folder
def test_nuts_agrees_with_the_reference_and_a_shifted_reference_does_not() -> None:
    posterior = load("sblrc-blr", FOLDER)
    settings = Settings(chains=2, samples=150, warmup=100, depth=5)
    start = find_start(posterior.model)
    row = nuts_row(posterior, start, settings)
    assert row["worst_z"] < 4.5 and row["divergences"] == 0 and row["rhat"] < 1.1 and row["count_z"] == 6
    moved = posterior.draws + 0.5 * posterior.reference.std(0)
    shifted = Posterior(posterior.name, posterior.model, posterior.names, moved)
    z = agreement(posterior.draws[:2, :200], shifted.draws)[0]
    assert float(z.abs().min()) > 5


@needs_folder
def test_a_guide_that_fails_is_a_row() -> None:
    posterior = load("kidiq-kidscore_momiq", FOLDER)
    start = find_start(posterior.model)
    rows = rows_of(posterior, start, "full-normal", Settings(steps=1, lr=-1.0))
    assert len(rows) == 1 and rows[0]["status"].startswith("OptionError")
    frame = pd.DataFrame(rows)
    assert posteriordb.verdicts(frame) == {}


# ------------------------------------------------------------------------------------------------------ bad input


def test_a_missing_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="no checkout of posteriordb"):
        names(tmp_path)
    monkeypatch.delenv("DGM_DATA", raising=False)
    with pytest.raises(DataError, match="DGM_DATA"):
        load("arK-arK")


@needs_folder
def test_unknown_names() -> None:
    with pytest.raises(DataError, match="did you mean 'arK-arK'"):
        load("arK-ark", FOLDER)
    with pytest.raises(OptionError, match="did you mean 'full-normal'"):
        posteriordb.chosen("full-norml", ["full-normal", "NUTS"], "guide", ";")
    with pytest.raises(SystemExit):
        posteriordb.main(["--folder", str(FOLDER), "--posteriors", "arK-ark"])


def one_posterior(folder: Path, layout: str = "flat", name: str = "sblrc-blr", data: str = "sblrc") -> Path:
    """A folder with one posterior, in this layout."""
    root = folder if layout == "flat" else folder / "posterior_database"
    data_at, draws_at = (
        ("data", "reference_draws") if layout == "flat" else ("data/data", "reference_posteriors/draws/draws")
    )
    for place, file in (
        ("posteriors", f"posteriors/{name}.json"),
        (data_at, f"data/{data}.json.zip"),
        (draws_at, f"reference_draws/{name}.json.zip"),
    ):
        (root / place).mkdir(parents=True, exist_ok=True)
        shutil.copy(FOLDER / file, root / place)
    return root


@needs_folder
def test_a_full_checkout_has_another_layout(tmp_path: Path) -> None:
    one_posterior(tmp_path, "checkout")
    assert names(tmp_path) == ["sblrc-blr"]
    assert torch.equal(load("sblrc-blr", tmp_path).draws, load("sblrc-blr", FOLDER).draws)


@needs_folder
@pytest.mark.parametrize("file", ["data/sblrc.json.zip", "reference_draws/sblrc-blr.json.zip"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "missing"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str, damage: str) -> None:
    path = one_posterior(tmp_path) / file
    held = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(held) // 2
        flipped = held[:middle] + bytes(255 - b for b in held[middle : middle + 8]) + held[middle + 8 :]
        path.write_bytes({"truncated": held[:middle], "empty": b"", "flipped": flipped}[damage])
    with pytest.raises(DataError, match=r"sblrc.*json\.zip"):
        load("sblrc-blr", tmp_path)


@needs_folder
def test_other_damage(tmp_path: Path) -> None:
    root = one_posterior(tmp_path)
    about = json.loads((root / "posteriors/sblrc-blr.json").read_text())
    for change, message in (
        ({"model_name": "blur"}, "no program here"),
        ({"reference_posterior_name": None}, "no reference draws"),
    ):
        (root / "posteriors/sblrc-blr.json").write_text(json.dumps(about | change))
        assert names(root) == []
        with pytest.raises(DataError, match=message):
            load("sblrc-blr", root)
    (root / "posteriors/sblrc-blr.json").write_text(json.dumps(about))
    draws = root / "reference_draws"
    (draws / "sblrc-blr.json.zip").unlink()
    for content in ([], [{"sigma": [1.0]}, {"sigma": [1.0, 2.0]}], [{"sigma": [1.0, float("nan")]}], {"a": 1}):
        (draws / "sblrc-blr.json").write_text(json.dumps(content))
        with pytest.raises(DataError, match="damaged"):
            load("sblrc-blr", root)
    (root / "data/sblrc.json.zip").unlink()
    (root / "data/sblrc.json").write_text("{}")
    (draws / "sblrc-blr.json").write_text(json.dumps([{"sigma": [1.0, 2.0]}]))
    with pytest.raises(DataError, match="do not fit the model"):
        load("sblrc-blr", root)


def test_every_program_has_a_name() -> None:
    assert len(posteriordb_models.models()) == 16
