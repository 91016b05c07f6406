"""The bank: drawn from its seed alone, measured once, frozen, bit-equal on disk."""

import itertools
import json
import os
import tempfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from hf_curriculum_distill import ProjectionBank
from hf_curriculum_distill.projections import FILE_NAME, PROJECTIONS
from hf_curriculum_distill.projections.matrices import DRAWN, MEASURED

# what seed 0 draws for pair (1, 2) of widths 2 and 3
KNOWN = {
    "gaussian": [[-0.6629283, 0.8697559, -0.2701952], [-0.3167550, -0.8258203, -0.3035150]],
    "rademacher": [[0.5773503, -0.5773503, -0.5773503], [0.5773503, 0.5773503, -0.5773503]],
    "orthogonal": [[-0.5884960, 0.7721013, -0.2398582], [-0.6308375, -0.6240611, -0.4610767]],
    "identity": [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]],
}

TEACHER = {"fingerprint": "a" * 64, "name": "org/teacher", "revision": "c0ffee"}

every_kind = pytest.mark.parametrize("kind", PROJECTIONS)
every_drawn_kind = pytest.mark.parametrize("kind", DRAWN)
every_measured_kind = pytest.mark.parametrize("kind", MEASURED)


def weight(bank, pair=(1, 2)):
    return bank.tensors()[f"layer_{pair[0]}_{pair[1]}.weight"]


def batches(sizes, dim=6, seed=0, scale=1.0, offset=0.0):
    """Calibration batches `(hidden states of layer 2 and 4, mask)`."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for size in sizes:
        hidden = {t: torch.randn(size, 5, dim, generator=generator) * scale + offset for t in (2, 4)}
        mask = torch.rand(size, 5, generator=generator) < 0.7
        mask[:, 0] = True
        made.append((hidden, mask))
    return made


def teacher(batch, layers):
    return {layer: batch[0][layer] for layer in layers}, batch[1]


def two_pairs(kind="gaussian", seed=0, **shared):
    return ProjectionBank.create([(1, 2), (2, 4)], [4, 4], [6, 6], kind=kind, seed=seed, **shared)


@every_drawn_kind
@given(seed=st.integers(0, 2**40), global_seed=st.integers(0, 100))
def test_a_matrix_depends_on_its_seed_and_pair_alone(kind, seed, global_seed):
    torch.manual_seed(global_seed)
    alone = ProjectionBank.create([(1, 2)], [4], [6], kind=kind, seed=seed)
    torch.manual_seed(global_seed + 1)
    among = ProjectionBank.create([(3, 5), (1, 2), (2, 4)], [3, 4, 2], [9, 6, 7], kind=kind, seed=seed)
    assert torch.equal(weight(alone), weight(among))
    state = torch.get_rng_state()
    ProjectionBank.create([(1, 2)], [4], [6], kind=kind, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("kind", ["gaussian", "rademacher", "orthogonal"])
def test_other_seeds_and_other_pairs_are_other_matrices(kind):
    bank = two_pairs(kind)
    assert not torch.equal(weight(bank), weight(bank, (2, 4)))
    assert not torch.equal(weight(bank), weight(two_pairs(kind, seed=1)))
    assert two_pairs(kind).matrix_fingerprint != two_pairs(kind, seed=1).matrix_fingerprint


@every_drawn_kind
def test_a_shared_matrix_is_that_of_every_pair_of_these_dims_and_of_no_other_seed(kind):
    def shared(pairs, seed=0):
        return ProjectionBank.create(pairs, [4] * len(pairs), [6] * len(pairs), kind=kind, seed=seed, shared=True)

    bank = shared([(1, 2), (2, 4)])
    assert torch.equal(weight(bank), weight(bank, (2, 4)))
    assert torch.equal(weight(bank), weight(shared([(1, 2)])))
    bank.fit(teacher, batches([8]))
    assert not torch.equal(bank.tensors()["layer_1_2.std"], bank.tensors()["layer_2_4.std"])
    if kind != "identity":
        assert not torch.equal(weight(bank), weight(shared([(1, 2)], seed=1)))


def test_the_seed_gives_the_same_bank_on_every_machine():
    drawn = {kind: weight(ProjectionBank.create([(1, 2)], [2], [3], kind=kind, seed=0)) for kind in DRAWN}
    expected = {kind: torch.tensor(KNOWN[kind]) for kind in DRAWN}
    for kind in DRAWN:
        torch.testing.assert_close(drawn[kind], expected[kind], rtol=0, atol=1e-6)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_seed_gives_the_same_bank_whatever_torchs_defaults_are(kind, dtype):
    drawn, fitted = two_pairs(kind), two_pairs(kind).fit(teacher, batches([8]))
    sample, default = batches([8]), torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        with torch.device("meta"):  # as a model is made whose weights are read later
            again = two_pairs(kind)
        assert again.fingerprint == drawn.fingerprint
        assert again.fit(teacher, sample).fingerprint == fitted.fingerprint
        assert again.project(1, sample[0][0][2]).dtype == torch.float32
    finally:
        torch.set_default_dtype(default)


def test_gaussian_entries_have_variance_one_over_the_teachers_width():
    matrix = weight(ProjectionBank.create([(1, 2)], [400], [100], kind="gaussian"))
    assert matrix.mean().item() == pytest.approx(0, abs=0.002)
    assert matrix.var().item() == pytest.approx(1 / 100, rel=0.03)


def test_rademacher_entries_are_plus_or_minus_one_over_the_root():
    matrix = weight(ProjectionBank.create([(1, 2)], [64], [25], kind="rademacher"))
    assert set(matrix.unique().tolist()) == set(torch.tensor([-0.2, 0.2]).tolist())
    assert matrix.mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("rows, columns", [(4, 6), (6, 6), (1, 5)])
def test_orthogonal_rows_are_orthonormal(rows, columns):
    matrix = weight(ProjectionBank.create([(1, 2)], [rows], [columns], kind="orthogonal")).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(rows).double(), atol=1e-6, rtol=0)


def test_a_wider_students_orthogonal_columns_are_orthogonal_with_rows_of_mean_square_one():
    matrix = weight(ProjectionBank.create([(1, 2)], [9], [4], kind="orthogonal")).double()
    torch.testing.assert_close(matrix.T @ matrix, 9 / 4 * torch.eye(4).double(), atol=1e-6, rtol=0)
    assert matrix.square().sum(1).mean().item() == pytest.approx(1.0, rel=1e-6)


def test_identity_copies_the_first_units():
    bank = ProjectionBank.create([(1, 2)], [4], [6], kind="identity").freeze()
    hidden = torch.randn(2, 3, 6)
    assert torch.equal(bank.project(1, hidden), hidden[..., :4])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (([(1, 2)], [4], [6], "learned"), "projection is 'learned'; use one of gaussian, rademacher"),
        (([(1, 2)], [4, 4], [6], "gaussian"), "1 layer pairs came with 2 student and 1 teacher dimensions"),
        (([(1, 2), (1, 3)], [4, 4], [6, 6], "gaussian"), "name a student layer twice"),
        (([(1, 2)], [7], [6], "identity"), "the student has 7 and the teacher 6"),
        (([(1, 2)], [7], [6], "pca"), "as many directions as the teacher has units, 6, but the student has 7; use a"),
        (([(1, 2)], [7], [6], "rotated_pca"), "projection='rotated_pca' finds .* such as 'orthogonal'"),
    ],
)
def test_banks_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ProjectionBank.create(*arguments)


# ---- fit ----


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 0, 7], [11, 1]])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_fit_measures_the_slow_mean_and_deviation_however_the_sample_is_cut(sizes, offset):
    (hidden, mask), *_ = batches([12], offset=offset)
    cuts = torch.tensor(sizes).cumsum(0).tolist()
    spans = [slice(end - size, end) for size, end in zip(sizes, cuts, strict=True)]
    parts = [({layer: states[span] for layer, states in hidden.items()}, mask[span]) for span in spans]
    bank = two_pairs().fit(teacher, parts)
    for student_layer, teacher_layer in bank.layer_pairs:
        states = [hidden[teacher_layer][b, i].double() for b in range(12) for i in range(5) if mask[b, i]]
        matrix = weight(bank, (student_layer, teacher_layer)).double()
        projected = [matrix @ state for state in states]
        mean = sum(projected) / len(projected)
        std = (sum((p - mean) ** 2 for p in projected) / len(projected)).sqrt()
        tolerance = {"rtol": 1e-5, "atol": 1e-6 * (1 + offset)}
        tensors = {n: bank.tensors()[f"layer_{student_layer}_{teacher_layer}.{n}"].double() for n in ("mean", "std")}
        torch.testing.assert_close(tensors["mean"], mean, **tolerance)
        torch.testing.assert_close(tensors["std"], std, **tolerance)


@every_kind
def test_projected_calibration_states_are_standardised(kind):
    sample = batches([40], scale=3.0, offset=2.0)
    bank = two_pairs(kind).fit(teacher, sample)
    for student_layer, teacher_layer in bank.layer_pairs:
        targets = bank.project(student_layer, sample[0][0][teacher_layer])[sample[0][1]]
        torch.testing.assert_close(targets.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.std(0, correction=0), torch.ones(4), atol=1e-5, rtol=0)


@given(seed=st.integers(0, 1000))
def test_project_is_the_standardised_product(seed):
    bank = two_pairs().fit(teacher, batches([8], offset=1.0))
    hidden = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(seed))
    tensors = {name: tensor.double() for name, tensor in bank.tensors().items()}
    expected = hidden.double() @ tensors["layer_2_4.weight"].T
    expected = (expected - tensors["layer_2_4.mean"]) / tensors["layer_2_4.std"]
    torch.testing.assert_close(bank.project(2, hidden).double(), expected, rtol=1e-4, atol=1e-5)


def test_project_is_float32_whatever_comes_in():
    bank = two_pairs().fit(teacher, batches([8]))
    hidden = torch.randn(2, 3, 6).bfloat16()
    plain = bank.project(1, hidden)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = bank.project(1, hidden)
    assert plain.dtype == autocast.dtype == torch.float32
    assert torch.equal(plain, autocast)
    assert torch.equal(plain, bank.project(1, hidden.float()))


def test_fit_is_the_same_under_autocast():
    plain = two_pairs().fit(teacher, batches([8]))
    with torch.autocast("cpu", torch.bfloat16):
        assert two_pairs().fit(teacher, batches([8])).fingerprint == plain.fingerprint


@pytest.mark.parametrize("value", [7.0, 0.1, -1e-3, 1234.567])
def test_a_coordinate_that_never_varies_has_target_zero(value):
    sample = batches([8, 3])
    for hidden, _ in sample:
        for states in hidden.values():
            states[..., 1] = value
    bank = two_pairs("identity").fit(teacher, sample)
    targets = bank.project(1, sample[0][0][2])
    torch.testing.assert_close(targets[..., 1], torch.zeros_like(targets[..., 1]), rtol=0, atol=1e-4)
    assert torch.isfinite(targets).all()
    assert bank.tensors()["layer_1_2.std"][1] == 1.0


@every_kind
@pytest.mark.parametrize("seed", range(5))
def test_states_that_never_vary_are_refused(kind, seed):
    state = torch.randn(64, generator=torch.Generator().manual_seed(seed)).expand(3, 5, 64)
    bank = ProjectionBank.create([(1, 2)], [48], [64], kind=kind, seed=seed)
    with pytest.raises(ValueError, match="at layer 2 are the same at all 15 calibration positions"):
        bank.fit(teacher, [({2: state, 4: state}, torch.ones(3, 5))])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_states_that_are_not_finite_are_refused_where_they_count(bad):
    sample = batches([8])
    sample[0][1][3, 2] = False
    sample[0][0][4][3, 2] = bad
    two_pairs().fit(teacher, sample)
    sample[0][1][3, 2] = True
    with pytest.raises(FloatingPointError, match="hidden states at layer 4 are not finite"):
        two_pairs().fit(teacher, sample)


@pytest.mark.parametrize("sample", [[], [({2: torch.randn(2, 5, 6), 4: torch.randn(2, 5, 6)}, torch.zeros(2, 5))]])
def test_an_empty_sample_is_refused(sample):
    with pytest.raises(ValueError, match="calibration sample has no position that counts"):
        two_pairs().fit(teacher, sample)


def test_a_fitted_bank_never_changes():
    bank = two_pairs().fit(teacher, batches([8]))
    assert bank.frozen
    before = bank.fingerprint
    bank.project(1, torch.randn(2, 3, 6))
    with pytest.raises(ValueError, match="fitted and frozen already"):
        bank.fit(teacher, batches([8], seed=1))
    assert bank.fingerprint == before
    with pytest.raises(ValueError, match="fitted and frozen already"):
        two_pairs().freeze().fit(teacher, batches([8]))


def test_fit_changes_the_fingerprint_but_not_the_matrices():
    fresh, fitted = two_pairs(), two_pairs().fit(teacher, batches([8]))
    assert fresh.fingerprint != fitted.fingerprint
    assert fresh.matrix_fingerprint == fitted.matrix_fingerprint
    assert fitted.fingerprint == two_pairs().fit(teacher, batches([8])).fingerprint


def test_a_bank_that_was_measured_fits_the_teacher_that_it_was_measured_on_alone():
    def check(bank, fingerprint):
        bank.check_fits([(1, 2), (2, 4)], 4, 6, fingerprint)

    measured = two_pairs().fit(teacher, batches([8]), TEACHER)
    check(measured, TEACHER["fingerprint"])
    with pytest.raises(ValueError, match=r"measured on org/teacher with weights aaaaaaaaaaaa, .* has bbbbbbbbbbbb"):
        check(measured, "b" * 64)
    with pytest.raises(ValueError, match="but the teacher changes while it teaches"):
        check(measured, None)
    for other in ("b" * 64, None):
        check(two_pairs().freeze(), other)
        check(two_pairs(), other)
    for other in ("a" * 64, None):
        with pytest.raises(ValueError, match="measured on a teacher with weights that fit was not told of"):
            check(two_pairs().fit(teacher, batches([8])), other)


def test_the_fingerprint_says_who_was_measured_and_whether():
    banks = [two_pairs(), two_pairs().freeze(), two_pairs().fit(teacher, batches([8]))]
    banks += [two_pairs().fit(teacher, batches([8]), TEACHER | {"fingerprint": letter * 64}) for letter in "ab"]
    assert len({bank.fingerprint for bank in banks}) == 5
    assert len({bank.matrix_fingerprint for bank in banks}) == 1


# ---- a PCA, whose matrices are measured ----


def stretched(sizes=(40,), dim=6, seed=0):
    """Calibration batches whose states vary more in some directions than in others, other ones at each layer."""
    made = batches(sizes, dim, seed)
    generator = torch.Generator().manual_seed(seed)
    stretch = {t: torch.randn(dim, dim, generator=generator) * 0.5 ** torch.arange(dim) for t in (2, 4)}
    offset = 3 * torch.randn(dim, generator=generator)
    return [({t: s @ stretch[t].T + offset for t, s in hidden.items()}, mask) for hidden, mask in made]


def counted(sample, layer):
    return torch.cat([hidden[layer][mask] for hidden, mask in sample]).double()


def covariance(vectors):
    return torch.cov(vectors.T, correction=0)


@every_measured_kind
@pytest.mark.parametrize("shared", [False, True])
def test_a_pca_has_no_matrices_before_fit_and_is_not_applied_without(kind, shared, tmp_path):
    bank = two_pairs(kind, shared=shared)
    bank.save_pretrained(tmp_path)
    for unfitted in (bank, ProjectionBank.from_pretrained(tmp_path)):
        for apply in (lambda: unfitted.project(1, torch.randn(2, 6)), unfitted.freeze):  # noqa: B023
            with pytest.raises(
                ValueError, match=rf"matrices of a '{kind}' projection are found by ProjectionBank\.fit"
            ):
                apply()
        assert unfitted.lacks_matrices and not unfitted.frozen
    bank.fit(teacher, stretched())
    assert bank.frozen and not bank.lacks_matrices
    assert bank.project(1, torch.randn(2, 6)).shape == (2, 4)


def test_targets_of_a_standardised_pca_are_white():
    sample = stretched()
    bank = two_pairs("pca").fit(teacher, sample)
    for student_layer, teacher_layer in bank.layer_pairs:
        targets = bank.project(student_layer, counted(sample, teacher_layer)).double()
        torch.testing.assert_close(covariance(targets), torch.eye(4).double(), rtol=0, atol=1e-4)


def test_targets_of_a_rotated_pca_keep_the_relative_sizes_of_the_directions():
    sample = stretched()
    bank = two_pairs("rotated_pca").fit(teacher, sample, standardize=False)
    for student_layer, teacher_layer in bank.layer_pairs:
        states = counted(sample, teacher_layer)
        sizes = torch.linalg.eigvalsh(covariance(bank.project(student_layer, states).double()))
        torch.testing.assert_close(sizes, torch.linalg.eigvalsh(covariance(states))[2:], rtol=1e-4, atol=1e-6)


@every_measured_kind
@pytest.mark.parametrize("standardize", [True, False])
def test_a_pca_is_the_same_however_the_sample_is_cut(kind, standardize):
    (hidden, mask), *_ = stretched([12])
    banks = []
    for sizes in ([12], [1] * 12, [5, 0, 7]):
        parts = zip(
            *({t: s.split(sizes) for t, s in hidden.items()}[t] for t in (2, 4)), mask.split(sizes), strict=True
        )
        banks.append(two_pairs(kind).fit(teacher, [({2: a, 4: b}, m) for a, b, m in parts], standardize=standardize))
    for bank in banks[1:]:
        for name, tensor in bank.tensors().items():
            torch.testing.assert_close(tensor, banks[0].tensors()[name], rtol=1e-6, atol=1e-7)
    again = two_pairs(kind).fit(teacher, [(hidden, mask)], standardize=standardize)
    assert again.fingerprint == banks[0].fingerprint


@every_measured_kind
def test_without_standardisation_a_pca_has_its_matrices_alone(kind):
    sample = stretched()
    plain, standard = two_pairs(kind).fit(teacher, sample, standardize=False), two_pairs(kind).fit(teacher, sample)
    for name, tensor in plain.tensors().items():
        expected = (
            standard.tensors()[name] if name.endswith("weight") else torch.full((4,), float(name.endswith("std")))
        )
        assert torch.equal(tensor, expected)
    torch.testing.assert_close(plain.project(1, sample[0][0][2]), sample[0][0][2] @ weight(plain).T)
    assert plain.metadata["teacher"] is not None  # it fits no other


@every_measured_kind
def test_a_shared_pca_has_one_matrix_and_statistics_of_each_layer(kind):
    sample = stretched()
    bank = two_pairs(kind, shared=True).fit(teacher, sample)
    assert torch.equal(weight(bank), weight(bank, (2, 4)))
    assert not torch.equal(weight(bank), weight(two_pairs(kind).fit(teacher, sample)))
    for student_layer, teacher_layer in bank.layer_pairs:
        targets = bank.project(student_layer, counted(sample, teacher_layer))
        torch.testing.assert_close(targets.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
        torch.testing.assert_close(targets.std(0, correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_the_matrices_fingerprint_of_a_pca_says_what_they_are_measured_for_before_and_after():
    kinds = [{"kind": kind, "seed": seed, "shared": s} for kind in MEASURED for seed in (0, 1) for s in (False, True)]
    banks = [two_pairs(**arguments) for arguments in kinds]
    fresh = [bank.matrix_fingerprint for bank in banks]
    assert [bank.fit(teacher, stretched()).matrix_fingerprint for bank in banks] == fresh
    assert len(set(fresh)) == len(fresh) and two_pairs().matrix_fingerprint not in fresh
    assert len({bank.fingerprint for bank in banks}) == len(banks)


@every_measured_kind
def test_a_pca_is_not_measured_on_a_teacher_that_changes_nor_fits_another(kind):
    bank = two_pairs(kind)
    bank.check_fits([(1, 2)], 4, 6, "a" * 64)
    with pytest.raises(ValueError, match=rf"a '{kind}' projection are measured on the teacher before the first step"):
        bank.check_fits([(1, 2)], 4, 6, None)
    bank.fit(teacher, stretched(), TEACHER)
    bank.check_fits([(1, 2)], 4, 6, TEACHER["fingerprint"])
    with pytest.raises(ValueError, match="measured on org/teacher"):
        bank.check_fits([(1, 2)], 4, 6, "b" * 64)


@every_measured_kind
def test_a_sample_with_no_more_positions_than_directions_is_refused(kind):
    states = torch.randn(5, 1, 6)
    two_pairs(kind).fit(teacher, [({2: states, 4: states}, torch.ones(5, 1))])
    with pytest.raises(ValueError, match="has 4 positions that count, in which no 4 principal directions can be found"):
        two_pairs(kind).fit(teacher, [({2: states, 4: states}, torch.tensor([[1], [1], [0], [1], [1]]))])


def test_a_pca_of_states_with_fewer_directions_gives_targets_of_zero():
    states = torch.randn(8, 5, 6) * torch.tensor([3.0, 2.0, 0.0, 0.0, 0.0, 1.0])
    bank = two_pairs("pca").fit(teacher, [({2: states + 100, 4: states}, torch.ones(8, 5))])
    for student_layer, offset in ((1, 100), (2, 0)):
        targets = bank.project(student_layer, states + offset)
        assert torch.equal(targets[..., 3], torch.zeros(8, 5))
        torch.testing.assert_close(
            targets[..., :3].flatten(0, 1).std(0, correction=0), torch.ones(3), rtol=1e-3, atol=0
        )


# ---- files ----


@st.composite
def banks(draw):
    """Banks of any kind, widths and seed: as drawn, taken as they are, or fitted to random states."""
    kind = draw(st.sampled_from(PROJECTIONS))
    students = draw(st.lists(st.integers(0, 5), unique=True, min_size=1, max_size=3))
    pairs = [(student, draw(st.integers(0, 5))) for student in students]
    width = draw(st.integers(1, 5))
    widths = [draw(st.integers(1, width if kind in ("identity", *MEASURED) else 7)) for _ in pairs]
    arguments = {"kind": kind, "seed": draw(st.integers(0, 2**63)), "shared": draw(st.booleans())}
    bank = ProjectionBank.create(pairs, widths, [width] * len(pairs), **arguments)
    identity = draw(st.none() | st.fixed_dictionaries({n: st.none() | st.text() for n in TEACHER}))
    state = draw(st.sampled_from(["drawn", "fitted"] if kind in MEASURED else ["drawn", "frozen", "fitted"]))
    if state == "fitted":
        hidden = torch.randn(6, 4, 5, width, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        bank.fit(teacher, [(hidden, torch.ones(4, 5))], identity)
    bank = bank.freeze() if state == "frozen" else bank
    measured = (identity or dict.fromkeys(TEACHER)) if state == "fitted" else None
    return (
        bank,
        measured,
        arguments | {"layer_pairs": pairs, "student_dims": widths, "teacher_dims": [width] * len(pairs)},
    )


@settings(deadline=None, max_examples=60)
@given(banks())
def test_a_saved_bank_is_read_to_the_bit(drawn):
    bank, measured, arguments = drawn
    with tempfile.TemporaryDirectory() as folder:
        bank.save_pretrained(folder)
        read = ProjectionBank.from_pretrained(folder)
        assert os.listdir(folder) == [FILE_NAME]
    assert read.tensors().keys() == bank.tensors().keys()
    assert all(torch.equal(tensor, bank.tensors()[name]) for name, tensor in read.tensors().items())
    assert (read.fingerprint, read.frozen) == (bank.fingerprint, bank.frozen)
    assert (read.layer_pairs, read.shapes, read.metadata) == (bank.layer_pairs, bank.shapes, bank.metadata)
    widths = list(zip(arguments["student_dims"], arguments["teacher_dims"], strict=True))
    assert read.shapes == dict(zip(arguments["layer_pairs"], widths, strict=True))
    assert read.metadata == {name: arguments[name] for name in ("kind", "seed", "shared")} | {"teacher": measured}
    hidden = torch.randn(2, 3, widths[0][1])
    for student_layer, _ in () if bank.lacks_matrices else bank.layer_pairs:
        assert torch.equal(read.project(student_layer, hidden), bank.project(student_layer, hidden))


@settings(deadline=None, max_examples=40)
@given(banks(), st.randoms(use_true_random=False))
def test_a_fingerprint_does_not_depend_on_the_order_of_the_pairs_or_the_device(drawn, random):
    bank, _, arguments = drawn
    columns = ("layer_pairs", "student_dims", "teacher_dims")
    rows = list(zip(*(arguments[name] for name in columns), strict=True))
    random.shuffle(rows)
    again = ProjectionBank.create(**arguments | dict(zip(columns, zip(*rows, strict=True), strict=True)))
    assert again.matrix_fingerprint == bank.matrix_fingerprint
    fingerprint = bank.fingerprint
    for device in ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]:
        assert bank.to(device).fingerprint == fingerprint


def contents(folder):
    with safe_open(os.path.join(folder, FILE_NAME), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.fixture(scope="module")
def flipped(tmp_path_factory):
    """Read a small saved bank with one bit of its file flipped: `flipped(byte, bit)`; and how its bytes divide."""
    folder = tmp_path_factory.mktemp("flipped")
    bank = ProjectionBank.create([(1, 2)], [2], [3]).freeze()
    bank.save_pretrained(folder)
    whole = (folder / FILE_NAME).read_bytes()
    tensors_start = 8 + int.from_bytes(whole[:8], "little")

    def read(byte, bit):
        changed = bytearray(whole)
        changed[byte] ^= 1 << bit
        (folder / FILE_NAME).write_bytes(changed)
        return ProjectionBank.from_pretrained(folder)

    return read, bank, tensors_start, len(whole)


def test_one_flipped_bit_of_any_tensor_is_found(flipped):
    read, _, start, end = flipped
    assert end - start == 4 * (2 * 3 + 2 + 2)
    for byte, bit in itertools.product(range(start, end), range(8)):
        with pytest.raises(ValueError, match=r"does not match the fingerprint|is not a readable projection bank"):
            read(byte, bit)


@settings(deadline=None, max_examples=200)
@given(data=st.data(), bit=st.integers(0, 7))
def test_one_flipped_bit_before_the_tensors_is_found_or_changes_none(flipped, data, bit):
    read, bank, start, _ = flipped
    try:
        damaged = read(data.draw(st.integers(0, start - 1)), bit)
    except ValueError:
        return
    assert (damaged.fingerprint, damaged.layer_pairs, damaged.frozen) == (bank.fingerprint, bank.layer_pairs, True)


def test_a_damaged_file_is_refused(tmp_path):
    two_pairs().save_pretrained(tmp_path)
    whole = (tmp_path / FILE_NAME).read_bytes()
    for length in (0, 7, len(whole) // 2, len(whole) - 1):
        (tmp_path / FILE_NAME).write_bytes(whole[:length])
        with pytest.raises(ValueError, match="is not a readable projection bank"):
            ProjectionBank.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format_version": "1"}, "has format version 1, this library reads 2, .* create the bank anew from its seed"),
        ({"kind": '"rademacher"'}, "tensors or metadata were changed afterwards"),
        ({"seed": "1"}, "tensors or metadata were changed afterwards"),
        ({"shared": "true"}, "tensors or metadata were changed afterwards"),
        ({"frozen": "false"}, "tensors or metadata were changed afterwards"),
        ({"teacher": "null"}, "tensors or metadata were changed afterwards"),
        ({"teacher": json.dumps(TEACHER | {"fingerprint": "b" * 64})}, "tensors or metadata were changed afterwards"),
        ({"teacher": json.dumps(TEACHER | {"name": "other/teacher"})}, "tensors or metadata were changed afterwards"),
        ({"note": "1"}, "tensors or metadata were changed afterwards"),
        ({"teacher": json.dumps({"fingerprint": "a" * 64})}, "is not a readable projection bank .its teacher is"),
        ({"teacher": '"org/teacher"'}, "is not a readable projection bank .its teacher is 'org/teacher'"),
        ({"layer_pairs": json.dumps([[1, 2], [2, 4], [3, 6]])}, "is not a readable projection bank"),
        ({"layer_pairs": "[["}, "is not a readable projection bank"),
        ({"fingerprint": "0" * 64}, "does not match the fingerprint"),
        ({"kind": '"pca"', "teacher": "null"}, "its kind is 'pca', but it was measured on no teacher"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(change, message, tmp_path):
    two_pairs().fit(teacher, batches([8]), TEACHER).save_pretrained(tmp_path)
    tensors, metadata = contents(tmp_path)
    assert (metadata | change) != metadata
    save_file(tensors, tmp_path / FILE_NAME, metadata=metadata | change)
    with pytest.raises(ValueError, match=message):
        ProjectionBank.from_pretrained(tmp_path)


def test_a_file_without_metadata_is_refused(tmp_path):
    save_file({"weight": torch.zeros(2)}, tmp_path / FILE_NAME)
    with pytest.raises(ValueError, match="is not a readable projection bank"):
        ProjectionBank.from_pretrained(tmp_path)
