"""The loss: Eqs. 6-8 as loops in float64, limits with torch's cross-entropy, and who gets which gradient."""

import math

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import convert_to_fp32

from tasn_timm.distillation import TASNLoss, soft_target_cross_entropy
from tasn_timm.tasn import TASNOutput

B, K = 4, 5
TARGET = torch.tensor([0, 3, 4, 3])
HEADS = ("both", "shared", "separate")
OTHER_WEIGHTS = dict(temperature=3.0, soft_weight=0.7, part_weight=0.3, attention_weight=1.9)


def random_logits(seed, dtype=torch.float64):
    return 3 * torch.randn(B, K, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def output_of(heads, seed=0):
    """Logits as the model gives them; with one pair of classifiers two of the five are missing."""
    tensors = [random_logits(seed + i).requires_grad_() for i in range(5)]
    if heads == "both":
        return TASNOutput(*tensors)
    student, teacher, attention = tensors[:3]
    return TASNOutput(logits=student, master=None, part=teacher, shared_part=None, attention=attention)


def with_repetitions(output):
    """With one pair of classifiers: as if each view had two that agree."""
    if output.master is not None:
        return output
    return output._replace(master=output.logits, shared_part=output.part)


def softmax(row, temperature):
    """Eq. 6."""
    powers = [math.exp((z - max(row)) / temperature) for z in row]
    return [power / math.fsum(powers) for power in powers]


def loop_soft_target(student, teacher, temperature):
    """Eq. 7, averaged over the batch."""
    total = 0.0
    for z_s, z_d in zip(student.tolist(), teacher.tolist()):
        q_s, q_d = softmax(z_s, temperature), softmax(z_d, temperature)
        total -= sum(q_d[i] * math.log(q_s[i]) for i in range(len(z_s)))
    return total / len(student)


def loop_classification(logits, smoothing=0.0):
    """Cross-entropy against labels with the weight `smoothing` spread evenly over the classes."""
    total = 0.0
    for row, label in zip(logits.tolist(), TARGET.tolist()):
        for i, probability in enumerate(softmax(row, 1)):
            wanted = (1 - smoothing) * (i == label) + smoothing / len(row)
            total -= wanted * math.log(probability)
    return total / len(logits)


def loop_loss(
    output, heads, temperature=10.0, soft_weight=2.0, part_weight=1.0, attention_weight=1.0, smoothing=0.0
) -> float:
    """The published weights for "both", Eq. 8 plus the part's and the attention net's own losses for one pair."""

    def ce(logits):
        return loop_classification(logits, smoothing)

    output = with_repetitions(output)
    soft = loop_soft_target(output.master, output.part, temperature)
    attention = attention_weight * ce(output.attention)
    if heads == "both":
        structure = 0.5 * ce(output.logits) + 0.5 * ce(output.master)
        detail = 0.5 * ce(output.shared_part) + 0.5 * ce(output.part)
        return attention + structure + part_weight * detail + soft_weight / 2 * soft
    return attention + ce(output.master) + part_weight * ce(output.part) + soft_weight * soft


@pytest.mark.parametrize("temperature", [10.0, 1.0, 0.5, 3.7])
def test_soft_target_cross_entropy_equals_eqs_6_and_7(temperature):
    student, teacher = random_logits(0), random_logits(1)
    loss = soft_target_cross_entropy(student, teacher, temperature)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(loop_soft_target(student, teacher, temperature), rel=1e-12)


def test_the_default_temperature_is_10():
    student, teacher = random_logits(0), random_logits(1)
    assert soft_target_cross_entropy(student, teacher) == soft_target_cross_entropy(student, teacher, 10.0)
    assert TASNLoss().temperature == 10


def test_a_certain_teacher_at_temperature_1_is_cross_entropy_with_labels():
    student = random_logits(0)
    teacher = 1e4 * F.one_hot(TARGET, K).double()
    soft = soft_target_cross_entropy(student, teacher, temperature=1.0)
    torch.testing.assert_close(soft, F.cross_entropy(student, TARGET), rtol=1e-12, atol=0)


def test_a_teacher_that_knows_nothing_asks_for_the_uniform_distribution():
    student = torch.zeros(B, K, dtype=torch.float64)
    soft = soft_target_cross_entropy(student, student)
    assert soft.item() == pytest.approx(math.log(K))


def test_a_student_equal_to_the_teacher_is_at_the_minimum():
    teacher = random_logits(1)
    student = teacher.clone().requires_grad_()
    soft_target_cross_entropy(student, teacher).backward()
    torch.testing.assert_close(student.grad, torch.zeros_like(student), rtol=0, atol=1e-15)


@pytest.mark.parametrize("temperature", [10.0, 1.0, 2.5])
def test_the_gradient_of_the_student_is_the_difference_of_the_distributions(temperature):
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    soft_target_cross_entropy(student, teacher, temperature).backward()
    for gradient, z_s, z_d in zip(student.grad.tolist(), student.tolist(), teacher.tolist()):
        q_s, q_d = softmax(z_s, temperature), softmax(z_d, temperature)
        expected = [(s - d) / (temperature * B) for s, d in zip(q_s, q_d)]
        assert gradient == pytest.approx(expected, rel=1e-10, abs=1e-15)


@pytest.mark.parametrize("name", ["soft_weight", "part_weight", "attention_weight", "shared_part_weight"])
@pytest.mark.parametrize("weight", [-1.0, float("nan"), float("inf")])
def test_a_weight_that_is_negative_or_not_finite_is_refused(name, weight):
    with pytest.raises(ValueError, match=f"{name} must be 0 or more, got {weight}"):
        TASNLoss(**{name: weight})


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [{}, OTHER_WEIGHTS], ids=["default_weights", "other_weights"])
@pytest.mark.parametrize("heads", HEADS)
def test_loss_equals_the_formula(heads, weights, smoothing):
    output = output_of(heads)
    loss = TASNLoss(heads=heads, smoothing=smoothing, **weights)(output, TARGET)["loss"]
    expected = loop_loss(output, heads, smoothing=smoothing, **weights)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_defaults_with_both_heads_are_the_published_weights():
    output = output_of("both")
    names = ("attention", "logits", "master", "part", "shared_part")
    ce = {name: loop_classification(getattr(output, name)) for name in names}
    halves = 0.5 * ce["logits"] + 0.5 * ce["master"] + 0.5 * ce["part"] + 0.5 * ce["shared_part"]
    expected = 1.0 * ce["attention"] + halves + 1.0 * loop_soft_target(output.master, output.part, 10.0)
    assert TASNLoss()(output, TARGET)["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("heads", ["shared", "separate"])
def test_defaults_with_one_pair_of_heads_are_eq_8_as_printed(heads):
    output = output_of(heads)
    z_s, z_d = output.logits, output.part
    eq_8 = loop_classification(z_s) + 2 * loop_soft_target(z_s, z_d, 10.0)
    expected = eq_8 + loop_classification(z_d) + loop_classification(output.attention)
    assert TASNLoss(heads=heads)(output, TARGET)["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("heads", HEADS)
def test_the_parts_of_the_loss_are_returned_before_weighting(heads):
    output = output_of(heads)
    parts = TASNLoss(heads=heads, **OTHER_WEIGHTS)(output, TARGET)
    assert set(parts) == {"loss", "structure", "detail", "soft", "attention"}
    assert all(value.shape == () for value in parts.values())

    output = with_repetitions(output)
    structure = (loop_classification(output.logits) + loop_classification(output.master)) / 2
    detail = (loop_classification(output.part) + loop_classification(output.shared_part)) / 2
    assert parts["structure"].item() == pytest.approx(structure, rel=1e-12)
    assert parts["detail"].item() == pytest.approx(detail, rel=1e-12)
    assert parts["soft"].item() == pytest.approx(loop_soft_target(output.master, output.part, 3.0), rel=1e-12)
    assert parts["attention"].item() == pytest.approx(loop_classification(output.attention), rel=1e-12)


@pytest.mark.parametrize("heads", HEADS)
def test_a_detached_teacher_learns_from_labels_alone(heads):
    output = output_of(heads)
    TASNLoss(heads=heads)(output, TARGET)["soft"].backward()
    assert output.part.grad is None
    assert with_repetitions(output).master.grad.abs().sum() > 0


@pytest.mark.parametrize("heads", HEADS)
def test_the_published_code_pulls_the_teacher_as_well(heads):
    output = output_of(heads)
    parts = TASNLoss(heads=heads, detach_teacher=False)(output, TARGET)
    parts["soft"].backward()

    student, teacher = with_repetitions(output).master, output.part
    for gradient, z_s, z_d in zip(teacher.grad.tolist(), student.tolist(), teacher.tolist()):
        q_s, q_d = softmax(z_s, 10.0), softmax(z_d, 10.0)  # -d/dz_d sum_i q_d log q_s
        mean = sum(d * math.log(s) for s, d in zip(q_s, q_d))
        expected = [-d * (math.log(s) - mean) / (10.0 * B) for s, d in zip(q_s, q_d)]
        assert gradient == pytest.approx(expected, rel=1e-8, abs=1e-12)
    detached = TASNLoss(heads=heads)(output, TARGET)
    assert {name: value.item() for name, value in parts.items()} == {name: v.item() for name, v in detached.items()}


@pytest.mark.parametrize("heads", HEADS)
def test_every_classifier_gets_a_gradient(heads):
    output = output_of(heads)
    TASNLoss(heads=heads)(output, TARGET)["loss"].backward()
    assert all(logits.grad.abs().sum() > 0 for logits in output if logits is not None)


@pytest.mark.parametrize(
    "term, weight", [("soft", "soft_weight"), ("detail", "part_weight"), ("attention", "attention_weight")]
)
def test_a_weight_of_zero_switches_its_term_alone_off(term, weight):
    parts = TASNLoss(heads="separate", **{weight: 0.0})(output_of("separate"), TARGET)
    weighted = {"structure": 1.0, "detail": 1.0, "soft": 2.0, "attention": 1.0} | {term: 0.0}
    expected = sum(parts[name].item() * factor for name, factor in weighted.items())
    assert parts["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match=f"temperature.*greater than 0.*{temperature}"):
        TASNLoss(temperature=temperature)


def test_unknown_heads_are_told_with_a_suggestion():
    with pytest.raises(ValueError, match=r"heads 'seperate'.*did you mean 'separate'"):
        TASNLoss(heads="seperate")


@pytest.mark.parametrize(("of_loss", "of_model", "pairs"), [("both", "shared", "one"), ("separate", "both", "two")])
def test_a_loss_refuses_a_model_with_other_classifiers(of_loss, of_model, pairs):
    """Also after accelerate's mixed precision, which copies every tensor: else the predictor would not be trained."""
    loss, output = TASNLoss(heads=of_loss), output_of(of_model)
    for each in (output, convert_to_fp32(output)):
        with pytest.raises(ValueError, match=rf"heads='{of_loss}'\) does not fit a model with {pairs} pair"):
            loss(each, TARGET)


def test_low_precision_logits_are_raised_to_float32():
    student, teacher = torch.randn(4, 200).bfloat16(), torch.randn(4, 200).bfloat16()
    loss = soft_target_cross_entropy(student, teacher)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, soft_target_cross_entropy(student.float(), teacher.float()), rtol=0, atol=0)


@pytest.mark.parametrize("smoothing", [-0.1, 1.5])
def test_smoothing_outside_its_range_is_refused(smoothing):
    with pytest.raises(ValueError, match=rf"smoothing must be between 0 and 1, got {smoothing}"):
        TASNLoss(smoothing=smoothing)


def test_a_temperature_of_zero_is_refused_by_the_function_too():
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        soft_target_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2), 0)


def loop_terms(output, temperature):
    """Every term of `TASNLoss` without its weight; an image's details averaged over the parts. None for no view."""
    output = with_repetitions(output)
    ce = {name: loop_classification(z) for name, z in output._asdict().items() if z is not None and len(z) == B}
    for name in {"part", "shared_part"} - set(ce):
        chunks = getattr(output, name).split(B)
        ce[name] = math.fsum(map(loop_classification, chunks)) / len(chunks)
    chunks = output.part.split(B)
    soft = math.fsum(loop_soft_target(output.master, chunk, temperature) for chunk in chunks) / len(chunks)
    return ce, soft


def several_parts(heads, parts):
    """As `output_of`, with `parts` detail images for every image: all images' first part first."""
    output = output_of(heads)
    part = torch.cat([random_logits(10 + p) for p in range(parts)])
    shared = torch.cat([random_logits(20 + p) for p in range(parts)]) if heads == "both" else None
    return output._replace(part=part, shared_part=shared)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("scale_soft", [False, True])
@pytest.mark.parametrize(
    ("shared_part_weight", "master_weight"), [(None, 0.5), (0.4, 0.5), (None, 0.2), (0.4, 0.2), (None, 1.0)]
)
def test_loss_equals_the_formula_with_all_weights(shared_part_weight, master_weight, scale_soft, parts):
    output, m = several_parts("both", parts), master_weight
    ce, soft = loop_terms(output, 3.0)
    shared = 0.3 if shared_part_weight is None else shared_part_weight
    expected = 1.9 * ce["attention"] + (1 - m) * (ce["logits"] + shared * ce["shared_part"])
    expected += m * (ce["master"] + 0.3 * ce["part"] + 0.7 * soft * (9 if scale_soft else 1))
    loss = TASNLoss(**OTHER_WEIGHTS, master_weight=m, shared_part_weight=shared_part_weight, scale_soft=scale_soft)(
        output, TARGET
    )["loss"]
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_master_weight_of_zero_leaves_the_shared_classifier():
    output = output_of("both")
    ce, _ = loop_terms(output, 10.0)
    expected = ce["attention"] + ce["logits"] + ce["shared_part"]
    assert TASNLoss(master_weight=0.0)(output, TARGET)["loss"].item() == pytest.approx(expected, rel=1e-12)


def test_the_defaults_spelled_out_change_nothing():
    defaults = dict(temperature=10.0, soft_weight=2.0, part_weight=1.0, attention_weight=1.0, detach_teacher=True)
    more = dict(smoothing=0.0, heads="both", master_weight=0.5, shared_part_weight=1.0, scale_soft=False)
    output = output_of("both")
    assert TASNLoss(**defaults, **more)(output, TARGET) == TASNLoss()(output, TARGET)


@pytest.mark.parametrize("heads", HEADS)
def test_several_parts_are_the_average_of_one(heads):
    output = several_parts(heads, 3)
    loss = TASNLoss(heads=heads, smoothing=0.1, **OTHER_WEIGHTS)
    shared = [None] * 3 if output.shared_part is None else output.shared_part.split(B)
    chunks = zip(output.part.split(B), shared)
    single = [loss(output._replace(part=part, shared_part=shared), TARGET) for part, shared in chunks]
    for name, value in loss(output, TARGET).items():
        assert value.item() == pytest.approx(sum(parts[name].item() for parts in single) / 3, rel=1e-12), name


@pytest.mark.parametrize("heads", HEADS)
def test_scale_soft_multiplies_the_soft_target_alone(heads):
    output, temperature = output_of(heads), 4.0
    plain = TASNLoss(temperature, heads=heads)(output, TARGET)
    scaled = TASNLoss(temperature, heads=heads, scale_soft=True)(output, TARGET)
    assert scaled["soft"].item() == temperature**2 * plain["soft"].item()
    assert all(scaled[name] == plain[name] for name in ("structure", "detail", "attention"))
    weight = 1.0 if heads == "both" else 2.0
    difference = (scaled["loss"] - plain["loss"]).item()
    assert difference == pytest.approx(weight * (temperature**2 - 1) * plain["soft"].item(), rel=1e-12)


def test_scale_soft_makes_the_gradient_independent_of_the_temperature():
    sizes = {}
    for scale_soft in (False, True):
        for temperature in (100.0, 400.0):
            output = output_of("separate")
            loss = TASNLoss(temperature, heads="separate", scale_soft=scale_soft)
            loss(output, TARGET)["soft"].backward()
            sizes[scale_soft, temperature] = output.logits.grad.norm().item()
    assert sizes[True, 100.0] == pytest.approx(sizes[True, 400.0], rel=0.02)
    assert sizes[False, 100.0] == pytest.approx(16 * sizes[False, 400.0], rel=0.02)


def test_a_model_without_a_part_net_has_no_detail_and_no_soft_target():
    output = output_of("shared")._replace(part=None)
    losses = TASNLoss(heads="shared", attention_weight=0.4)(output, TARGET)
    assert set(losses) == {"loss", "structure", "attention"}
    expected = 0.4 * loop_classification(output.attention) + loop_classification(output.logits)
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-12)


def test_a_model_without_a_master_net_has_its_details_alone():
    output = several_parts("shared", 2)._replace(logits=None)
    losses = TASNLoss(heads="shared", part_weight=0.3)(output, TARGET)
    assert set(losses) == {"loss", "detail", "attention"}
    details = [loop_classification(chunk) for chunk in output.part.split(B)]
    assert losses["detail"].item() == pytest.approx(sum(details) / 2, rel=1e-12)
    expected = loop_classification(output.attention) + 0.3 * sum(details) / 2
    assert losses["loss"].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("share", [-0.1, 1.5, math.nan])
def test_a_master_weight_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=rf"master_weight must be between 0 and 1, got {share}"):
        TASNLoss(master_weight=share)


NO_SOFT_TARGET = [dict(temperature=3.0), dict(detach_teacher=False), dict(scale_soft=True)]


@pytest.mark.parametrize(
    ("kwargs", "cause"),
    [
        *((other, dict(soft_weight=0.0)) for other in NO_SOFT_TARGET),
        *((other, dict(master_weight=0.0)) for other in NO_SOFT_TARGET),
        *((dict(master_weight=0.3), dict(heads=heads)) for heads in ("shared", "separate")),
        *((dict(shared_part_weight=0.3), dict(heads=heads)) for heads in ("shared", "separate")),
        (dict(soft_weight=3.0), dict(master_weight=0.0)),
        (dict(shared_part_weight=0.3), dict(master_weight=1.0)),
    ],
)
def test_weights_without_effect_are_refused_with_their_cause(kwargs, cause):
    with pytest.raises(ValueError, match=rf"{next(iter(kwargs))}=.* has no effect with {next(iter(cause))}="):
        TASNLoss(**kwargs, **cause)
