"""TASNTask: the objective in timm's own training loop, and what that loop does around it."""

import copy
import inspect
import os
from pathlib import Path

import pytest
import timm
import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.task import ClassificationTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, freeze
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from tasn_timm import TASN, TASNLoss
from tasn_timm.task import TASNTask, create_task

KINDS = {
    "both": {},
    "separate": dict(heads="separate"),
    "shared": dict(heads="shared"),
    "two_parts": dict(parts=2),
    "master_only": dict(part_net=False),
    "part_only": dict(master_net=False),
    "two_parts_only": dict(parts=2, master_net=False),
}


def tiny(name: str = "tasn", seed: int = 0, **kwargs) -> nn.Module:
    torch.manual_seed(seed)
    ours = dict(backbone="test_resnet", sample_size=32, attention_net="tiny") if name == "tasn" else {}
    return timm.create_model(name, num_classes=5, **ours | kwargs).train()


def batch(size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(size, 3, 6, 6, generator=generator)
    return F.interpolate(coarse, size=(64, 64), mode="bicubic"), torch.arange(size) % 5


def step(task: ClassificationTask, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    torch.manual_seed(seed)  # the details
    loss = task(*batch(seed=seed))["loss"]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def momentum(task: ClassificationTask) -> torch.optim.Optimizer:
    return torch.optim.SGD(task.get_trainable_module().parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_losses_are_tasnlosses_of_the_models_output(kind):
    task, (images, target) = TASNTask(tiny(**KINDS[kind])), batch()
    model = task.get_trainable_module()
    torch.manual_seed(2)
    losses = task(images, target)
    torch.manual_seed(2)
    output = model(images)
    expected = TASNLoss(heads=model.heads.heads)(output, target)
    assert set(losses) == {*expected, "output"}
    for name, value in expected.items():
        torch.testing.assert_close(losses[name], value, rtol=0, atol=0)
    predicting = output.logits if KINDS[kind].get("master_net", True) else output.part[:4]
    torch.testing.assert_close(losses["output"], predicting, rtol=0, atol=0)
    losses["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def mixed(images: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return Mixup(mixup_alpha=0.5, cutmix_alpha=0.5, label_smoothing=0.1, num_classes=5)(images, target)


CRITERIA = {
    "smoothing": (
        dict(criterion=LabelSmoothingCrossEntropy(0.2)),
        lambda logits, target: F.cross_entropy(logits, target, label_smoothing=0.2),
    ),
    "criterion_kwargs": (
        dict(criterion_kwargs=dict(smoothing=0.2)),
        lambda logits, target: F.cross_entropy(logits, target, label_smoothing=0.2),
    ),
    "mixup": (
        dict(criterion=SoftTargetCrossEntropy()),
        lambda logits, target: -(target * logits.log_softmax(1)).sum() / len(logits),
    ),
    "bce": (
        dict(criterion_kwargs=dict(loss_type="bce", smoothing=0.2)),
        lambda logits, target: F.binary_cross_entropy(logits.sigmoid(), 0.8 * F.one_hot(target, 5) + 0.2 / 5),
    ),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_the_criterion_is_that_of_every_classifier(name):
    arguments, classify = CRITERIA[name]
    task, (images, target) = TASNTask(tiny(), **arguments), batch()
    if name == "mixup":
        images, target = mixed(images, target)
    torch.manual_seed(2)
    loss = task(images, target)["loss"]
    torch.manual_seed(2)
    out = task.get_trainable_module()(images)
    classified = [classify(logits, target) for logits in (out.logits, out.master, out.part, out.shared_part)]
    soft = -((out.part / 10).softmax(1) * (out.master / 10).log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, classify(out.attention, target) + 0.5 * sum(classified) + 0.5 * 2 * soft)


def test_the_losses_own_arguments_are_loss_kwargs():
    task, (images, target) = TASNTask(tiny(), loss_kwargs=dict(temperature=3.0, attention_weight=0.5)), batch()
    torch.manual_seed(2)
    loss = task(images, target)["loss"]
    torch.manual_seed(2)
    output = task.get_trainable_module()(images)
    expected = TASNLoss(temperature=3.0, attention_weight=0.5)(output, target)["loss"]
    torch.testing.assert_close(loss, expected, rtol=0, atol=0)


def test_timms_arguments_come_in_timms_order():
    """train.py passes them by name, other code may not."""
    ours, timms = (list(inspect.signature(task).parameters) for task in (TASNTask, ClassificationTask))
    assert ours == [*timms, "loss_kwargs"]


@pytest.mark.parametrize(
    ("error", "arguments"),
    [
        (ValueError, dict(criterion=nn.CrossEntropyLoss(), criterion_kwargs=dict(smoothing=0.1))),
        (TypeError, dict(criterion_kwargs=dict(smoothin=0.1))),
        (ValueError, dict(criterion_kwargs=dict(smoothing=0.1), loss_kwargs=dict(smoothing=0.1))),
        (ValueError, dict(loss_kwargs=dict(temperature=0.0))),
    ],
    ids=str,
)
def test_arguments_that_contradict_each_other_or_do_not_exist_are_refused(error, arguments):
    model = tiny()
    with pytest.raises(error):
        TASNTask(model, **arguments)
    assert not model.distilled_training


@pytest.mark.parametrize("wrap", [lambda model: model, nn.DataParallel, lambda model: torch.compile(model)])
def test_create_task_gives_a_tasn_its_own_task(wrap):
    task = create_task(wrap(tiny()), criterion=nn.CrossEntropyLoss(), device=torch.device("cpu"), verbose=False)
    assert type(task) is TASNTask


@pytest.mark.parametrize("name", ["test_resnet", "isqrt_cov"])
def test_create_task_gives_other_models_timms_task(name):
    model = tiny(name, **dict(backbone="test_resnet", pool_args=dict(channels=8)) if name == "isqrt_cov" else {})
    task = create_task(model, None, dict(smoothing=0.1))
    assert type(task) is ClassificationTask and task.criterion.smoothing == 0.1
    with pytest.raises(ValueError, match=rf"TASNTask trains a TASN, got {type(model).__name__}: use timm.task"):
        TASNTask(model)


def test_the_average_of_the_weights_predicts_as_a_model_with_these_weights():
    model = tiny()
    task = TASNTask(model)
    before = copy.deepcopy(model.state_dict())
    task.setup_ema(decay=0.75)
    step(task, momentum(task), seed=2)
    task.update_ema()
    after = model.state_dict()
    average = {
        name: 0.75 * old + 0.25 * after[name] if old.is_floating_point() else after[name]
        for name, old in before.items()
    }
    twin, (images, _) = tiny(), batch()
    twin.load_state_dict(average)
    logits = task.get_eval_model(ema=True).eval()(images)
    torch.testing.assert_close(logits, twin.eval()(images), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits, model.eval()(images), atol=1e-2)


def test_a_resumed_training_goes_on_as_if_nothing_had_happened(tmp_path):
    task = TASNTask(tiny())
    optimizer = momentum(task)
    task.setup_ema(decay=0.75)
    step(task, optimizer, seed=2)
    task.update_ema()
    saver = CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=str(tmp_path), task=task)
    saver.save_checkpoint(epoch=3, metric=50.0)

    resumed = TASNTask(tiny(seed=1))
    resumed_optimizer = momentum(resumed)
    path = str(tmp_path / "last.pth.tar")
    assert resume_task_checkpoint(resumed, path, optimizer=resumed_optimizer) == 4
    resumed.setup_ema(decay=0.75)
    load_task_ema_checkpoint(resumed, path)
    for each, its_optimizer in ((task, optimizer), (resumed, resumed_optimizer)):
        step(each, its_optimizer, seed=3)
        each.update_ema()
    for ema in (False, True):
        expected = task.get_checkpoint_state(ema=ema)["state_dict_ema" if ema else "state_dict"]
        state = resumed.get_checkpoint_state(ema=ema)["state_dict_ema" if ema else "state_dict"]
        assert set(state) == set(expected)
        assert [name for name, value in state.items() if not torch.equal(value, expected[name])] == []


def test_what_the_task_saves_is_a_checkpoint_of_the_model(tmp_path):
    task = TASNTask(tiny())
    step(task, momentum(task), seed=2)
    torch.save(task.get_checkpoint_state(), tmp_path / "last.pth.tar")
    model, (images, _) = tiny(seed=1, checkpoint_path=str(tmp_path / "last.pth.tar")), batch()
    expected = task.get_eval_model().eval()(images)
    torch.testing.assert_close(model.eval()(images), expected, rtol=0, atol=0)


@pytest.mark.parametrize("heads", ["both", "separate", "shared"])
def test_clipping_without_the_head_leaves_out_every_classifier(heads):
    model = tiny(heads=heads)
    task = TASNTask(nn.DataParallel(model))  # as under DDP, the names have a prefix
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert [names[id(p)] for p in task.get_clip_parameters()] == list(names.values())
    clipped = {names[id(p)] for p in task.get_clip_parameters(exclude_head=True)}
    classifiers = {name for name, p in model.named_parameters() if p.shape[0] == 5}
    assert clipped == set(names.values()) - classifiers
    assert len(classifiers) == 2 * (len(list(model.heads.children())) + 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["both", "two_parts", "part_only"])
def test_the_compiled_task_has_the_losses_of_the_plain_one(kind):
    plain, compiled, (images, target) = TASNTask(tiny(**KINDS[kind])), TASNTask(tiny(**KINDS[kind])), batch()
    compiled.compile(backend="aot_eager")
    results = []
    for task in (plain, compiled):
        torch.manual_seed(2)
        losses = task(images, target)
        losses["loss"].backward()
        results.append(losses)
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value)
    gradients = dict(compiled.get_trainable_module()._orig_mod.named_parameters())
    for name, parameter in plain.get_trainable_module().named_parameters():
        torch.testing.assert_close(gradients[name].grad, parameter.grad, atol=1e-4, rtol=1e-3, msg=name)
    logits = [task.get_eval_model().eval()(images) for task in (plain, compiled)]
    torch.testing.assert_close(logits[1], logits[0])
    assert set(compiled.get_checkpoint_state()["state_dict"]) == set(plain.get_checkpoint_state()["state_dict"])


PROCESSES = 2
DISTRIBUTED = [*KINDS, "frozen"]


def frozen_or(kind: str) -> TASN:
    model = tiny(**KINDS.get(kind, {}))
    if kind == "frozen":
        freeze(model, ["attention_net"])
    return model


def train_in_process(rank: int, folder: Path) -> None:
    """Check one gradient of DDP against the mean of the processes' own, and that they stay in sync."""
    os.environ |= dict(RANK=str(rank), WORLD_SIZE=str(PROCESSES))
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    for kind in DISTRIBUTED:
        alone, task = TASNTask(frozen_or(kind)), TASNTask(frozen_or(kind))
        images, target = batch(seed=rank)  # each process its own
        torch.manual_seed(10 + rank)
        alone(images, target)["loss"].backward()
        task.prepare_distributed()
        torch.manual_seed(10 + rank)
        task(images, target)["loss"].backward()
        model = task.get_trainable_module().module
        gradients = dict(alone.get_trainable_module().named_parameters())
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None, name
                continue
            mean = gradients[name].grad
            distributed.all_reduce(mean)
            torch.testing.assert_close(parameter.grad, mean / PROCESSES, atol=1e-5, rtol=1e-3, msg=f"{kind} {name}")
        optimizer = momentum(task)
        for seed in (20, 21):
            step(task, optimizer, seed + 10 * rank)
        for name, parameter in model.named_parameters():
            others = [torch.empty_like(parameter) for _ in range(PROCESSES)]
            distributed.all_gather(others, parameter.detach().contiguous())
            assert all(torch.equal(other, parameter) for other in others), f"{kind} {name}"
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_share_their_gradients_and_stay_in_sync(tmp_path):
    torch.multiprocessing.spawn(train_in_process, (tmp_path,), nprocs=PROCESSES)
