import dataclasses
import json
import random

import numpy as np
import pytest

from puzzle import pipeline
from puzzle.config import PlaceConfig
from puzzle.cost import COST, measure, regression, table
from puzzle.cost.measure import ScenarioMeasurement
from puzzle.cost.parts import Part
from puzzle.cost.probe import Probe, write_checkpoint
from puzzle.cost.regression import Samples
from puzzle.cost.table import COSTS, FITS, HEADER, Cost
from puzzle.engines import roofline_engine
from puzzle.errors import UserError
from puzzle.model.architecture import FFN, NO_FFN, Architecture, Attention
from puzzle.stage import Job


@pytest.fixture
def costed(tiny_run) -> Job:
    """A place with modelled costs."""
    job = tiny_run.place_job()
    pipeline.execute_stage(COST, job)
    return job


@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0])
def test_what_lasts_of_an_error_does_not_depend_on_its_size(scale):
    """Errors of 2 % as well as of 200: .6 of the last one is left, .2 of the one before."""
    rng, errors = np.random.default_rng(0), [0.0, 0.0]
    for _ in range(4000):
        errors.append(0.6 * errors[-1] + 0.2 * errors[-2] + rng.normal())
    found = regression._autoregression(scale * np.array(errors), 2)
    assert found == pytest.approx([0.6, 0.2], abs=0.05)
    assert (regression._autoregression(np.zeros(50), 2) == 0).all()


def time_on_roofline(job, folder, scenario):
    sheet = roofline_engine.sheet(job.place.cost.device_sheet)
    session = roofline_engine.RooflineSession(folder, scenario, sheet)
    session.begin(scenario)
    prefill_s, *steps_s = session.advance(scenario.output_length)
    return prefill_s, sum(steps_s)


def test_predictions_equal_the_engine_on_random_architectures(costed, tmp_path):
    """The roofline engine is exactly additive, so the table of its probe must reproduce it."""
    costs, rng = table.read(costed), random.Random(0)
    for index in range(10):
        layers = costed.run.space.layers
        architecture = Architecture(tuple(rng.choice(layer.blocks) for layer in layers))
        write_checkpoint(costed.run.parent, tmp_path / str(index), architecture)
        seconds = time_on_roofline(costed, tmp_path / str(index), costs.scenario)
        assert costs.predict(architecture).total_s == pytest.approx(sum(seconds), rel=1e-7)


def test_the_predicted_parent_is_the_measured_parent(costed):
    costs, parent = table.read(costed), costed.run.parent
    seconds = time_on_roofline(costed, parent.folder, costs.scenario)
    predicted = costs.predict(Architecture.of_parent(parent.shape))
    assert (predicted.prefill_s, predicted.decode_s) == pytest.approx(seconds)


def test_the_probe_holds_every_costly_variant_alone_and_equally_often(costed):
    shape, needed = costed.run.parent.shape, table.distinct_parts(costed)
    probe = Probe.of(needed, shape, (), 4)
    assert probe.architecture.blocks[0] == shape.widest_block
    assert set(probe.places) == {part for part in needed if part.variant.kind != "no_op"}
    assert len({len(places) for places in probe.places.values()}) == 1
    for (variant, _), places in probe.places.items():
        for block in (probe.architecture.blocks[place] for place in places):
            other = block.ffn if isinstance(variant, Attention) else block.attention
            assert variant in (block.attention, block.ffn) and other.kind == "no_op"


def test_layers_of_the_probe_make_up_the_architecture(costed):
    probe = Probe.of(table.distinct_parts(costed), costed.run.parent.shape, (), 4)
    rng, unused = random.Random(1), {}
    for _ in range(20):
        model = probe.random_model(rng, unused)
        layers = probe.layers_of(model, rng)
        served = Architecture(tuple(probe.architecture.blocks[index] for index in layers))
        assert layers[0] == 0 and probe.counts(probe.parts(served)) == probe.counts(model)


def standard_errors(models, probe):
    """Of every variant's seconds, where all samples are as noisy: in units of their noise."""
    counts = np.array([probe.counts(model) for model in models], dtype=float)
    return np.sqrt(np.linalg.inv(counts.T @ counts).diagonal())


def test_models_of_one_other_variant_say_more_than_mixed_ones(tiny):
    sizes = {"num_hidden_layers": 12, "num_key_value_heads": 2, "intermediate_size": 768}
    shape = dataclasses.replace(tiny.shape, **sizes)
    widths = [FFN("gated", width) for width in (768, 576, 384, 192, 64)]
    attentions = [Attention("gqa", heads) for heads in (2, 1)]
    probe = Probe.of([Part(variant) for variant in (*attentions, *widths)], shape, (), 4)
    rng, unused = random.Random(0), {}
    models = [probe.random_model(rng, unused) for _ in range(400)]
    for model in models:
        others = {part.variant for part in model[3::2]} - {widths[0], NO_FFN}
        assert len(others) <= 1

    def mixed(model):
        """With any width wherever the parent's was replaced by one."""
        others = [Part(width) for width in widths[1:]]
        return [rng.choice(others) if part in others else part for part in model]

    ours = standard_errors(models, probe)
    theirs = standard_errors([mixed(model) for model in models], probe)
    assert (ours[3:7] < theirs[3:7] / 1.8).all()  # of the other widths


def with_errors(fit):
    """(coefficients [U], their standard errors [U])."""
    beta, covariance = fit
    return beta, np.sqrt(covariance.diagonal())


def test_the_fit_finds_the_true_costs_through_noise_and_outliers():
    rng = np.random.default_rng(0)
    true = np.array([0.3, 0.1, 0.05, 1.0])
    samples = Samples()
    for _ in range(400):
        counts = [*rng.integers(0, 6, size=3), 1]
        noise = 3.0 if rng.random() < 0.05 else rng.normal(1, 0.05)  # one in twenty is disturbed
        samples.add(counts, float(counts @ true * noise))
    fitted, error = with_errors(samples.fit())
    assert np.abs(fitted - true).max() < 0.03 and (np.abs(fitted - true) < 5 * error).all()


def fitted_often(outliers, factor):
    """(coefficients [R, U], their standard errors [R, U]) of 60 fits with other noise each."""
    true, rng = np.array([0.3, 0.1, 0.05, 1.0]), np.random.default_rng(1)
    fits = []
    for _ in range(60):
        samples = Samples()
        for _ in range(200):
            counts = [*rng.integers(0, 6, size=3), 1]
            noise = factor if rng.random() < outliers else rng.normal(1, 0.05)
            samples.add(counts, float(counts @ true * noise))
        fits.append(with_errors(samples.fit()))
    betas, errors = (np.array(each) for each in zip(*fits, strict=True))
    return betas - true, errors


def test_standard_errors_are_as_large_as_the_errors():
    off, errors = fitted_often(outliers=0.0, factor=1.0)
    assert off.std(axis=0) == pytest.approx(errors.mean(axis=0), rel=0.35)  # 60 fits: 9 %


def test_disturbances_that_last_are_taken_off_and_standard_errors_say_so(monkeypatch):
    """Errors with a correlation of 0.7, as vLLM's turns have."""
    true, rng = np.array([0.3, 0.1, 0.05, 1.0]), np.random.default_rng(3)
    found = {"plain": [], "ours": []}
    for _ in range(60):
        samples, lasting = Samples(), 0.0
        for _ in range(200):
            lasting = 0.7 * lasting + rng.normal(0, 0.04)
            counts = [*rng.integers(0, 6, size=3), 1]
            samples.add(counts, float(counts @ true * (1 + lasting)))
        found["ours"].append(with_errors(samples.fit()))
        with monkeypatch.context() as patch:
            patch.setattr(regression, "LEAST_FOR_ORDER", 10**9)
            found["plain"].append(with_errors(samples.fit()))
    spread = {name: np.std([beta for beta, _ in fits], axis=0) for name, fits in found.items()}
    level = np.mean([beta for beta, _ in found["ours"]], axis=0) / true
    assert level == pytest.approx(1.0, abs=0.015)  # noise does not shrink the fit
    assert (spread["ours"][:3] < 0.85 * spread["plain"][:3]).all()
    errors = np.mean([error for _, error in found["ours"]], axis=0)
    assert spread["ours"][:3] == pytest.approx(errors[:3], rel=0.35)  # 60 fits: 9 %


def test_the_parents_turns_stand_anywhere_in_an_output(costed):
    """Contexts grow along an output: turns at two places of it would not be the parent's mean."""
    probe = Probe.of(table.distinct_parts(costed), costed.run.parent.shape, [], element_bytes=4)
    scenario = costed.place.cost.scenario
    measurement = ScenarioMeasurement("main", probe, None, scenario, 4)
    is_parent = [measurement._model("step") is measurement.reference for _ in range(1600)]
    by_place = np.array(is_parent).reshape(200, 8).sum(axis=0)
    assert by_place.min() > 25 and by_place.sum() == pytest.approx(400, rel=0.15)


def test_what_a_model_takes_is_surer_than_its_parts():
    """Where samples lie, errors of the constant and of the variants make up for each other."""
    true, rng = np.array([0.3, 0.1, 0.05, 1.0]), np.random.default_rng(4)
    model, off, sure, apart = np.array([4, 2, 6, 1]), [], [], []
    for _ in range(60):
        samples = Samples()
        for _ in range(200):
            counts = [*rng.integers(2, 7, size=3), 1]
            samples.add(counts, float(counts @ true * rng.normal(1, 0.05)))
        beta, covariance = samples.fit()
        off.append(model @ (beta - true))
        sure.append(float(model @ covariance @ model) ** 0.5)
        apart.append(float(model**2 @ covariance.diagonal()) ** 0.5)
    assert np.std(off) == pytest.approx(np.mean(sure), rel=0.35)  # 60 fits: 9 %
    assert np.mean(sure) < 0.5 * np.mean(apart)


def test_the_table_keeps_the_covariance_of_its_fit(costed, monkeypatch):
    made = []
    real = ScenarioMeasurement._fit_record

    def kept(self, fit, scales):
        noise = np.random.default_rng(5).normal(size=fit.prefill_covariance.shape)
        fit = dataclasses.replace(fit, prefill_covariance=noise @ noise.T)
        made.append((list(self.probe.places), fit))
        return real(self, fit, scales)

    monkeypatch.setattr(ScenarioMeasurement, "_fit_record", kept)
    costed.run.write_place("other", PlaceConfig(deploy=costed.place.deploy, cost=costed.place.cost))
    other = costed.run.place_job("other")
    pipeline.execute_stage(COST, other)
    (parts, fit), found = made[0], table.read(other).covariance
    keys = [part.key for part in parts]
    asked = [("attention", "no_op"), *reversed(keys), ("constant", "constant")]
    matrix = found.among(asked, "prefill")
    order = [*reversed(range(len(keys))), len(keys)]
    assert np.allclose(matrix[1:, 1:], fit.prefill_covariance[np.ix_(order, order)])
    assert not matrix[0].any() and not matrix[:, 0].any()  # a no-op costs nothing, surely
    path = other.folder(COST) / FITS
    record = json.loads(path.read_text())
    record["prefill_covariance"][0].append(1.0)
    record.pop("checksum", None)
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="expected covariances of"):
        table.read(other)


def test_a_series_needs_fewer_samples_than_any_widths_however_short_they_take():
    """Six widths on a straight line, of a microsecond each; 24 samples."""
    sizes, rng = np.array([1.0, 2, 3, 4, 5, 6]), np.random.default_rng(2)
    true = 1e-6 * np.append(1 + 0.2 * sizes, 5.0)
    series, off = [list(enumerate(sizes))], {"alone": [], "series": []}
    for _ in range(40):
        samples = Samples()
        for _ in range(24):
            counts = [*rng.integers(0, 4, size=6), 1]
            samples.add(counts, float(counts @ true * rng.normal(1, 0.1)))
        off["alone"].append(samples.fit()[0][:6] / true[:6] - 1)
        off["series"].append(samples.fit(series)[0][:6] / true[:6] - 1)
    spread = {name: np.std(values) for name, values in off.items()}
    assert spread["series"] < 0.6 * spread["alone"]


def test_outliers_beyond_three_standard_deviations_are_discarded():
    """One in ten takes a quarter more: five deviations."""
    off, errors = fitted_often(outliers=0.1, factor=1.25)
    assert (np.abs(off.mean(axis=0)) < 0.3 * errors.mean(axis=0)).all()


def test_memory_is_weights_plus_cache_where_nothing_else_is_taken(costed):
    parent = Architecture.of_parent(costed.run.parent.shape)
    predicted = table.read(costed).predict(parent)
    parameters = parent.parameters(costed.run.parent.shape)
    assert predicted.parameter_bytes == 4 * parameters
    # batch, tokens, layers, K and V, KV heads, head_dim, bytes
    cache = 8 * (16 + 16) * 4 * 2 * 2 * 16 * 4
    assert predicted.memory_bytes == 4 * parameters + cache


def test_what_serving_takes_besides_is_the_probes_peak_less_what_is_counted(costed, monkeypatch):
    real = roofline_engine.RooflineSession.memory_bytes
    more = lambda session: real(session) + 12_345  # noqa: E731
    monkeypatch.setattr(roofline_engine.RooflineSession, "memory_bytes", more)
    costed.run.write_place("other", PlaceConfig(deploy=costed.place.deploy, cost=costed.place.cost))
    other = costed.run.place_job("other")
    pipeline.execute_stage(COST, other)
    parent = Architecture.of_parent(costed.run.parent.shape)
    without, with_workspace = (table.read(job).predict(parent) for job in (costed, other))
    assert with_workspace.workspace_bytes == 12_345
    assert with_workspace.memory_bytes == without.memory_bytes + 12_345


def test_memory_is_parameters_cache_and_workspace():
    cost = Cost(1.0, 2.0, 10, parameter_bytes=100, kv_cache_bytes=50, workspace_bytes=7)
    assert cost.memory_bytes == 157


def test_the_first_batches_warm_up_and_do_not_count(tiny_run, monkeypatch):
    """An engine that takes 50 times as long in them: none of their seconds is a sample."""
    real, batches, measured = roofline_engine.RooflineSession.advance, [], []
    real_batch, real_records = ScenarioMeasurement._batch, ScenarioMeasurement.records

    def batch(measurement):
        batches.append(1)
        real_batch(measurement)

    def advance(session, steps, layers=()):
        slow = 50 if len(batches) <= measure.WARM_UPS else 1
        return [slow * seconds for seconds in real(session, steps, layers)]

    def records(measurement, variants):
        measured.append(measurement)
        return real_records(measurement, variants)

    monkeypatch.setattr(ScenarioMeasurement, "_batch", batch)
    monkeypatch.setattr(ScenarioMeasurement, "records", records)
    monkeypatch.setattr(roofline_engine.RooflineSession, "advance", advance)
    pipeline.execute_stage(COST, tiny_run.place_job())
    assert len(batches) > measure.WARM_UPS
    for samples in (measured[0].prefills, measured[0].steps):
        assert max(samples.seconds) < 10 * min(samples.seconds)


# ------------------------------------------------------------------------ a table that is given


def copy_table(job, folder):
    """The files of a place's costs, copied; the path that `cost.table` takes."""
    for name in (COSTS, HEADER, FITS):
        (folder / name).write_bytes((job.folder(COST) / name).read_bytes())
    return folder / COSTS


def reuse(job, path):
    """The costs of another place of the run, taken from a table."""
    settings = job.place.cost.model_copy(update={"table": str(path)})
    job.run.write_place("other", PlaceConfig(deploy=job.place.deploy, cost=settings))
    other = job.run.place_job("other")
    pipeline.execute_stage(COST, other)
    return other


def rewrite(path, edit):
    """Pass every line of a JSON Lines file through `edit`, which returns None to drop it."""
    lines = map(json.loads, path.read_text().splitlines())
    records = [edit({k: v for k, v in line.items() if k != "checksum"}) for line in lines]
    path.write_text("".join(json.dumps(r) + "\n" for r in records if r is not None))


def without(variant):
    return lambda record: None if record["variant"] == variant else record


def test_a_table_can_be_reused(costed):
    other = reuse(costed, costed.folder(COST) / COSTS)
    assert table.read(other) == table.read(costed)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["engine", "version"], "0"),
        (["engine", "engine"], "vllm"),
        (["engine", "device"], "other"),
        (["scenarios", "main", "dtype"], "float16"),
        (["scenarios"], {}),
        (["shape", "hidden_size"], 65),
        (["measured"], True),
    ],
)
def test_a_table_of_something_else_is_refused(costed, tmp_path, keys, value):
    path = copy_table(costed, tmp_path)
    header = json.loads((tmp_path / HEADER).read_text())
    section = header
    for key in keys[:-1]:
        section = section[key]
    section[keys[-1]] = value
    (tmp_path / HEADER).write_text(json.dumps(header))
    with pytest.raises(UserError, match=f"{'.'.join(keys)} is {value!r} there .* measure again"):
        reuse(costed, path)


def test_a_table_that_lacks_a_variant_is_refused(costed, tmp_path):
    path = copy_table(costed, tmp_path)
    rewrite(path, without("gqa_1"))
    with pytest.raises(UserError, match="has no attention gqa_1"):
        reuse(costed, path)


def test_a_table_that_lacks_a_scenario_is_refused(costed, tmp_path):
    path = copy_table(costed, tmp_path)
    path.write_text("")
    with pytest.raises(UserError, match="scenario main has no .*; measure again"):
        reuse(costed, path)


def test_a_table_that_is_not_there_is_one_clear_line(costed, tmp_path):
    with pytest.raises(UserError, match=r"costs.jsonl: no such file; expected"):
        reuse(costed, tmp_path / COSTS)


# ------------------------------------------------------------------------------ a damaged table


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "decode_s is nan; expected a number of at least 0"),
        (-1.0, "decode_s is -1.0; expected a number of at least 0"),
        (None, "line 1: decode_s: got None; Input should be a valid number"),
        ("fast", "line 1: decode_s: got 'fast'; Input should be a valid number"),
    ],
)
def test_a_bad_figure_is_one_clear_line(costed, value, message):
    path = costed.folder(COST) / COSTS
    records = [json.loads(line) for line in path.read_text().splitlines()]
    records = [{k: v for k, v in record.items() if k != "checksum"} for record in records]
    records[0]["decode_s"] = value
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    with pytest.raises(UserError, match=message) as raised:
        table.read(costed)
    assert "\n" not in str(raised.value)


def test_a_missing_variant_is_one_clear_line(costed):
    rewrite(costed.folder(COST) / COSTS, without("gqa_1"))
    with pytest.raises(
        UserError, match=r"scenario main has no attention gqa_1; measure again \(`puzzle cost`\)"
    ):
        table.read(costed)


def test_costs_add_up():
    a, b = Cost(1.0, 2.0, 3, 4, 5, 6), Cost(0.5, 0.25, 1, 1, 1, 2)
    assert dataclasses.astuple(a + b) == (1.5, 2.25, 4, 5, 6, 8)
    assert ((a + b).total_s, (a + b).memory_bytes) == (3.75, 5 + 6 + 8)


def test_wider_and_more_heads_never_cost_less(costed):
    variants = table.read(costed).variants
    assert variants["ffn", FFN("gated", 96).name].total_s > variants["ffn", "no_op"].total_s == 0
    caches = [variants["attention", name].kv_cache_bytes for name in ("gqa_1", "gqa_2")]
    assert caches[1] == 2 * caches[0]


@dataclasses.dataclass
class SlowedSession:
    """A modelled session every step of which takes longer, as without graphs and compilation."""

    session: roofline_engine.RooflineSession
    factor: float

    def __getattr__(self, name):
        return getattr(self.session, name)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def advance(self, steps, layers=()):
        return [self.factor * s for s in self.session.advance(steps, layers)]


def test_costs_are_scaled_by_the_parent_as_it_is_served(tiny_run):
    """Where the probe runs otherwise, such as on GPUs; its checkpoints then have no weights."""
    job = tiny_run.place_job()
    modelled, opened = job.engine, []

    def probe(folder, scenario):
        opened.append(folder.name)
        assert not list(folder.glob("*.safetensors"))
        return SlowedSession(modelled.probe(folder, scenario), 1.5)

    def serve(folder, scenario):
        opened.append(folder.name)
        assert not list(folder.glob("*.safetensors"))
        return modelled.serve(folder, scenario)

    job.__dict__["engine"] = dataclasses.replace(
        modelled, probe=probe, serve=serve, probes_as_served=False, makes_weights=True
    )
    pipeline.execute_stage(COST, job)
    assert opened == ["probe", "reference"]
    costs, parent = table.read(job), tiny_run.parent
    seconds = time_on_roofline(job, parent.folder, costs.scenario)
    predicted = costs.predict(Architecture.of_parent(parent.shape))
    assert (predicted.prefill_s, predicted.decode_s) == pytest.approx(seconds, rel=1e-6)
    assert not (job.folder(COST) / "reference").exists()


@pytest.mark.parametrize(("captured", "share"), [(False, 4), (True, 2)])
def test_time_that_is_up_needs_fewer_samples_where_each_captures_a_graph(costed, captured, share):
    probe = Probe.of(table.distinct_parts(costed), costed.run.parent.shape, (), 4)
    folder = costed.run.folder / "probed"
    write_checkpoint(costed.run.parent, folder, probe.architecture)
    scenario = costed.place.cost.scenario
    with costed.engine.probe(folder, scenario) as session:
        measured = ScenarioMeasurement("main", probe, session, scenario, 4, is_captured=captured)
        with costed.run.progress.task("", 1, "s") as task:
            measured.run(1e-9, 1e-9, task)
    assert all(map(any, zip(*measured.prefills.counts, strict=True)))  # every variant was served
    assert len(measured.prefills.seconds) >= share * (len(probe.places) + 1)
    assert (len(measured.prefills.seconds) < 4 * (len(probe.places) + 1)) == captured
