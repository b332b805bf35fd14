"""`pretrained=True`: whose weights go where, asked of the Hub's own client against a Hub on this machine."""

import hashlib
import json
import re
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from huggingface_hub import close_session
from safetensors.torch import save, save_file
from timm.models import PretrainedCfg, _registry, adapt_input_conv

import tasn_timm  # noqa: F401
from tasn_timm.hub import save_folder
from tasn_timm.zoo import _weights_cfg, starting_cfg

CONVNEXT, RESNET, EFFICIENTNET, VIT = (
    f"timm/test_{name}.r160_in1k" for name in ("convnext", "resnet", "efficientnet", "vit")
)
# Two backbones, each with its own repository.
TASN = dict(
    backbone="test_convnext", attention_net="lite", attention_backbone="test_resnet", sample_size=32, num_classes=7
)
OWN = dict(backbone="test_resnet", attention_net="tiny", sample_size=32, num_classes=3)  # no ImageNet weights


class Hub:
    """What the Hub's client asks for to download files: HEAD and GET of /<repo>/resolve/<revision>/<file>."""

    COMMIT = "c0ffee" + "0" * 34

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []  # method, repository/file
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub.answer(self)

            do_GET = do_HEAD

            def log_message(self, *args) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = re.sub(f"/resolve/(main|{self.COMMIT})/", "/", request.path.strip("/"))
        if not path.startswith("api/"):  # where the client learns about its own surroundings
            self.requests.append((request.command, path))
        body = self.files.get(path, b"")
        request.send_response(200 if path in self.files else 404)
        request.send_header("X-Repo-Commit", self.COMMIT)
        if path not in self.files:
            known = any(path.rsplit("/", 1)[0] == file.rsplit("/", 1)[0] for file in self.files)
            request.send_header("X-Error-Code", "EntryNotFound" if known else "RepoNotFound")
        request.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        request.send_header("Content-Length", str(len(body)))
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)

    def publish(self, repo: str, architecture: str | None = None, seed: int = 0, **kwargs) -> dict[str, torch.Tensor]:
        """Serve random weights of a timm model, `timm/<architecture>.<tag>` unless said otherwise; return them."""
        architecture = architecture or repo.removeprefix("timm/").split(".")[0]
        weights = random_state(timm.create_model(architecture, **kwargs), seed)
        self.files[f"{repo}/model.safetensors"] = save(weights)
        self.files[f"{repo}/config.json"] = json.dumps(dict(architecture=architecture)).encode()
        return weights

    def publish_folder(self, repo: str, folder: Path) -> None:
        self.files |= {f"{repo}/{path.name}": path.read_bytes() for path in folder.iterdir()}

    @property
    def asked(self) -> set[str]:
        """Repositories that were asked for anything."""
        return {path.rsplit("/", 1)[0] for _, path in self.requests}


def random_state(model: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random values for everything, statistics and scales as well, so that nothing is what it is by default."""
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for name, tensor in state.items():
        state[name] = torch.rand(tensor.shape, generator=generator) + 0.5 if tensor.is_floating_point() else tensor + 9
    return state


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, and a new cache of its client."""
    hub = Hub()
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    close_session()
    yield hub
    close_session()
    hub.server.shutdown()
    hub.server.server_close()


@pytest.fixture
def offline(monkeypatch):
    return lambda: monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def create(**kwargs) -> torch.nn.Module:
    return timm.create_model("tasn", **TASN | kwargs)


def assert_same(part: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    """Every parameter and buffer of a backbone, or of its features with their other names, is as expected."""
    flat = {name.removeprefix("model.").replace(".", "_"): value for name, value in expected.items()}
    state = part.state_dict()
    assert state
    for name, value in state.items():
        assert torch.equal(value, flat[name.removeprefix("model.").replace(".", "_")]), name


def adapted(weights: dict[str, torch.Tensor], stem: str, in_chans: int) -> dict[str, torch.Tensor]:
    return weights | {f"{stem}.weight": adapt_input_conv(in_chans, weights[f"{stem}.weight"])}


# Starting points


def test_both_backbones_start_from_their_own_repositories_each_asked_once(hub):
    convnext, resnet = hub.publish(CONVNEXT), hub.publish(RESNET)
    torch.manual_seed(1)
    model = create(pretrained=True)
    assert hub.requests == [
        (method, f"{repo}/model.safetensors") for repo in (CONVNEXT, RESNET) for method in ("HEAD", "GET")
    ]
    assert_same(model.backbone, convnext)
    assert_same(model.attention_net.trunk, resnet)
    torch.manual_seed(1)
    for name, value in create().state_dict().items():  # the rest is new, as without weights
        if not name.startswith(("backbone.", "attention_net.trunk.")):
            assert torch.equal(value, model.state_dict()[name]), name


@pytest.mark.parametrize(("in_chans", "num_classes"), [(1, 7), (3, 0), (3, 1000), (4, 7), (4, 0)])
def test_any_number_of_channels_and_classes(hub, in_chans, num_classes):
    convnext, resnet = hub.publish(CONVNEXT), hub.publish(RESNET)
    model = create(pretrained=True, in_chans=in_chans, num_classes=num_classes).eval()
    assert_same(model.backbone, adapted(convnext, "stem.0", in_chans))
    assert_same(model.attention_net.trunk, adapted(resnet, "conv1.0", in_chans))
    assert model(torch.rand(2, in_chans, 64, 64)).shape == (2, num_classes or model.head_hidden_size)
    assert model.num_classes == num_classes


def test_details_with_their_own_norms_start_with_the_backbone_s(hub):
    weights = hub.publish(RESNET)
    arguments = dict(backbone="test_resnet", attention_backbone="test_resnet", split_bn=True, parts=2)
    backbone = create(pretrained=True, **arguments).backbone.state_dict()
    own = {name: value for name, value in backbone.items() if ".aux_bn." in name}
    norms = [name for name in weights if name.endswith("running_var") and name in backbone]
    assert len(own) == 2 * 5 * len(norms) > 0
    for name, value in backbone.items():
        assert torch.equal(value, weights[re.sub(r"aux_bn.[01].", "", name)]), name


@pytest.mark.parametrize("in_chans", [3, 4])
def test_second_order_pooling_starts_from_its_backbone(hub, in_chans):
    weights = hub.publish(EFFICIENTNET)
    arguments = dict(backbone="test_efficientnet", num_classes=7, in_chans=in_chans, pool_args=dict(channels=8))
    model = timm.create_model("isqrt_cov", pretrained=True, **arguments)
    assert_same(model.backbone, adapted(weights, "conv_stem", in_chans))
    assert hub.asked == {EFFICIENTNET}


def test_a_named_model_starts_from_the_weights_that_its_cfg_names(hub):
    weights = hub.publish("timm/resnet18.a1_in1k")
    model = timm.create_model("tasn_resnet18", pretrained=True, num_classes=7)
    assert_same(model.backbone, weights)
    assert_same(model.attention_net.trunk, weights)
    assert hub.asked == {model.pretrained_cfg["hf_hub_id"]} == {"timm/resnet18.a1_in1k"}
    assert [method for method, _ in hub.requests].count("GET") == 1


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_vit_of_another_size_is_resized_as_timm_does(hub, in_chans):
    hub.publish(VIT)
    kwargs = dict(sample_size=(96, 64), in_chans=in_chans, attention_backbone="test_vit")
    layout = dict(input_size=128, out_indices=(1,), channels=None)
    model = create(pretrained=True, backbone="test_vit", attention_args=layout, **kwargs)
    for part, size in ((model.backbone, (96, 64)), (model.attention_net.trunk, (128, 128))):
        expected = timm.create_model("test_vit", pretrained=True, img_size=size, in_chans=in_chans).state_dict()
        assert expected["pos_embed"].shape[1] == 1 + size[0] * size[1] // 256 != 1 + 10 * 10
        assert_same(part, expected)


def test_features_of_the_backbone_have_its_weights(hub):
    convnext, _ = hub.publish(CONVNEXT), hub.publish(RESNET)
    model = create(pretrained=True, features_only=True, out_indices=(0, 1))
    assert_same(model.model.backbone, convnext)


def test_a_tag_picks_the_weights_of_both_backbones(hub, monkeypatch):
    for name in ("test_convnext", "test_resnet"):
        cfg = replace(
            timm.models.get_pretrained_cfg(name), tag="more_in12k", hf_hub_id=f"timm/{name}.more_in12k", num_classes=12
        )
        monkeypatch.setitem(_registry._model_pretrained_cfgs, f"{name}.more_in12k", cfg)
        tags = [*_registry._model_with_tags[name], f"{name}.more_in12k"]
        monkeypatch.setitem(_registry._model_with_tags, name, tags)
    convnext = hub.publish("timm/test_convnext.more_in12k", num_classes=12)
    resnet = hub.publish("timm/test_resnet.more_in12k", num_classes=12)
    model = create(pretrained=True, backbone="test_convnext.more_in12k", attention_backbone="test_resnet.more_in12k")
    assert_same(model.backbone, convnext)
    assert_same(model.attention_net.trunk, resnet)
    assert hub.asked == {"timm/test_convnext.more_in12k", "timm/test_resnet.more_in12k"}


@pytest.mark.parametrize("where", ["backbone", "attention_backbone"])
def test_an_unknown_tag_is_told_before_any_download(hub, where):
    with pytest.raises(ValueError, match="unknown weights of test_vit: 'test_vit.r160_in2k': did you mean"):
        create(pretrained=True, **{where: "test_vit.r160_in2k"})
    assert not hub.requests


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(backbone="test_mambaout"), "for test_mambaout, the backbone: .*, or a backbone with weights"),
        (dict(attention_backbone="test_mambaout"), "for test_mambaout, the backbone of the attention net"),
        (dict(attention_net="tiny", attention_backbone=None), r"for resnet6s.untrained.*\(published, lite\)"),
    ],
)
def test_a_backbone_without_weights_is_told_before_any_download(hub, arguments, message):
    hub.publish(CONVNEXT), hub.publish(RESNET)
    with pytest.raises(ValueError, match=f"no pretrained weights {message}"):
        create(pretrained=True, **arguments)
    assert not hub.requests


def test_second_order_pooling_of_a_backbone_without_weights_is_told(hub):
    with pytest.raises(ValueError, match="no pretrained weights for test_mambaout"):
        timm.create_model("isqrt_cov", pretrained=True, backbone="test_mambaout")


def test_a_cfg_of_every_backbone_with_weights_says_where_they_are():
    names = timm.list_pretrained(exclude_filters=["tasn*"])
    assert len(names) > 1600
    for name in names:
        expected = timm.models.get_pretrained_cfg(name)
        for cfg in (starting_cfg(name), _weights_cfg(name)):
            assert cfg.get("hf_hub_id") == expected.hf_hub_id, name
            assert cfg.get("hf_hub_id") or cfg["url"] == expected.url, name
            assert not (cfg.get("hf_hub_id") or "").endswith("/"), name
            assert (cfg["mean"], cfg["std"]) == (expected.mean, expected.std), name


# The cache


def test_cache_dir_takes_the_files_of_both_backbones(hub, tmp_path, offline):
    hub.publish(CONVNEXT), hub.publish(RESNET)
    model = create(pretrained=True, cache_dir=tmp_path / "mine")
    cached = {path.name for path in (tmp_path / "mine").glob("models--*")}
    assert cached == {repo.replace("timm/", "models--timm--") for repo in (CONVNEXT, RESNET)}
    assert not (tmp_path / "hub").exists() and not (tmp_path / "torch").exists()
    offline()
    again = create(pretrained=True, cache_dir=tmp_path / "mine")
    assert_same(again.backbone, model.backbone.state_dict())


@pytest.mark.parametrize("how", ["offline", "server down"])
def test_a_warm_cache_needs_no_hub(hub, offline, how):
    convnext, resnet = hub.publish(CONVNEXT), hub.publish(RESNET)
    create(pretrained=True)
    hub.requests.clear()
    if how == "offline":
        offline()
    else:
        hub.server.shutdown()
        hub.server.server_close()
    model = create(pretrained=True)
    assert_same(model.backbone, convnext)
    assert_same(model.attention_net.trunk, resnet)
    assert not hub.requests


def test_a_warm_cache_with_the_hub_downloads_nothing_again(hub):
    hub.publish(CONVNEXT), hub.publish(RESNET)
    create(pretrained=True)
    hub.requests.clear()
    create(pretrained=True)
    assert [method for method, _ in hub.requests] == ["HEAD", "HEAD"]


def test_a_cold_cache_offline_is_one_clear_error(hub, offline):
    offline()
    with pytest.raises(ValueError, match="weights of test_convnext.r160_in1k cannot be read: .*connection"):
        create(pretrained=True)
    assert not hub.requests


def test_a_missing_repository_is_one_clear_error(hub):
    hub.publish(CONVNEXT)
    with pytest.raises(ValueError, match="weights of test_resnet.r160_in1k cannot be read: .*Repository Not Found"):
        create(pretrained=True)


@pytest.mark.parametrize("other", [None, "cc-by-nc-4.0"])
def test_two_backbones_under_two_licences_have_none_together(hub, monkeypatch, other):
    hub.publish(CONVNEXT), hub.publish(RESNET), hub.publish("user/finetuned", "test_convnext", seed=5)
    own = timm.get_pretrained_cfg("test_convnext").license
    assert own and create(pretrained=True).pretrained_cfg["license"] == own
    monkeypatch.setattr(_registry._model_pretrained_cfgs["test_resnet.r160_in1k"], "license", other)
    assert create(pretrained=True).pretrained_cfg["license"] is None
    finetuned = dict(hf_hub_id="user/finetuned", license=own)  # of the backbone alone
    assert create(pretrained=True, pretrained_cfg_overlay=finetuned).pretrained_cfg["license"] is None
    assert create(pretrained=True, features_only=True).pretrained_cfg["license"] is None
    alone = timm.create_model("isqrt_cov", backbone="test_convnext", pretrained=True, pool_args=dict(channels=8))
    assert alone.pretrained_cfg["license"] == own


# Other sources of the backbone's weights


@pytest.mark.parametrize("kind", ["file", "hub", "url", "memory"])
def test_an_overlay_brings_other_weights_of_the_backbone(hub, tmp_path, kind):
    resnet = hub.publish(RESNET)
    finetuned = hub.publish("user/finetuned", "test_convnext", seed=5)
    save_file(finetuned, tmp_path / "finetuned.safetensors")
    torch.save(finetuned, tmp_path / "finetuned.pth")
    hub.files["user/finetuned/finetuned.pth"] = (tmp_path / "finetuned.pth").read_bytes()
    overlay = dict(
        file=dict(file=str(tmp_path / "finetuned.safetensors")),
        hub=dict(hf_hub_id="user/finetuned"),
        url=dict(url=f"{hub.url}/user/finetuned/finetuned.pth", hf_hub_id=None),
        memory=dict(state_dict=finetuned),
    )[kind]
    model = create(pretrained=True, pretrained_cfg_overlay=overlay, cache_dir=tmp_path / "mine")
    assert_same(model.backbone, finetuned)
    assert_same(model.attention_net.trunk, resnet)
    assert model.pretrained_cfg["license"] is None, "timm's is of other weights"
    assert hub.asked == {RESNET} | ({"user/finetuned"} if kind in ("hub", "url") else set())
    assert not (tmp_path / "hub").exists() and not (tmp_path / "torch").exists()


@pytest.mark.parametrize("in_chans", [1, 3])
def test_an_overlay_in_a_format_of_its_own_is_read_by_timm(hub, tmp_path, in_chans):
    """Its checkpoint filter of ViTs takes OpenCLIP's names off and resizes position embeddings."""
    weights = {f"visual.trunk.{key}": value for key, value in random_state(timm.create_model("test_vit"), 0).items()}
    save_file(weights, tmp_path / "clip.safetensors")
    overlay = dict(pretrained=True, in_chans=in_chans, pretrained_cfg_overlay=dict(file=tmp_path / "clip.safetensors"))
    model = timm.create_model("isqrt_cov", backbone="test_vit", img_size=(96, 96), **overlay)
    expected = timm.create_model("test_vit", img_size=96, num_classes=0, **overlay).state_dict()
    assert_same(model.backbone, expected)
    assert torch.equal(expected["blocks.0.norm1.weight"], weights["visual.trunk.blocks.0.norm1.weight"])


def jax_vit(folder: Path) -> Path:
    """A one-block test_vit as the ViT paper's code saved it."""
    rng = np.random.default_rng(0)
    block = "Transformer/encoderblock_0"
    attention = f"{block}/MultiHeadDotProductAttention_1"
    shapes = {
        "embedding/kernel": (16, 16, 3, 64),
        "embedding/bias": (64,),
        "cls": (1, 1, 64),
        "Transformer/posembed_input/pos_embedding": (1, 101, 64),
        f"{attention}/out/kernel": (2, 32, 64),
        f"{attention}/out/bias": (64,),
        f"{block}/MlpBlock_3/Dense_0/kernel": (64, 192),
        f"{block}/MlpBlock_3/Dense_0/bias": (192,),
        f"{block}/MlpBlock_3/Dense_1/kernel": (192, 64),
        f"{block}/MlpBlock_3/Dense_1/bias": (64,),
    }
    shapes |= {f"{attention}/{name}/kernel": (64, 2, 32) for name in ("query", "key", "value")}
    shapes |= {f"{attention}/{name}/bias": (2, 32) for name in ("query", "key", "value")}
    for norm in (f"{block}/LayerNorm_0", f"{block}/LayerNorm_2", "Transformer/encoder_norm"):
        shapes |= {f"{norm}/scale": (64,), f"{norm}/bias": (64,)}
    np.savez(folder / "vit.npz", **{name: rng.random(shape, np.float32) for name, shape in shapes.items()})
    return folder / "vit.npz"


@pytest.mark.parametrize("in_chans", [1, 3])
def test_weights_that_need_a_loader_of_their_own(hub, tmp_path, in_chans):
    resnet = hub.publish(RESNET)
    path = jax_vit(tmp_path)
    overlay = dict(file=str(path), custom_load=True)
    common = dict(pretrained=True, pretrained_cfg_overlay=overlay, in_chans=in_chans)
    model = create(backbone="test_vit", sample_size=96, backbone_args=dict(depth=1), **common)
    expected = timm.create_model("test_vit", img_size=96, depth=1, num_classes=0, **common).state_dict()
    assert_same(model.backbone, expected)
    assert_same(model.attention_net.trunk, adapted(resnet, "conv1.0", in_chans))
    assert torch.equal(expected["norm.weight"], torch.from_numpy(np.load(path)["Transformer/encoder_norm/scale"]))
    assert hub.asked == {RESNET}


def test_backbones_whose_weights_are_at_a_url(hub, tmp_path, monkeypatch):
    weights = random_state(timm.create_model("test_convnext"), 0)
    torch.save(weights, tmp_path / "convnext.pth")
    hub.files["release/convnext.pth"] = (tmp_path / "convnext.pth").read_bytes()
    url = f"{hub.url}/release/convnext.pth"
    cfg = replace(timm.models.get_pretrained_cfg("test_convnext"), hf_hub_id=None, url=url)
    for name in ("test_convnext", "test_convnext.r160_in1k"):
        monkeypatch.setitem(_registry._model_pretrained_cfgs, name, cfg)
    model = timm.create_model("isqrt_cov", backbone="test_convnext", pretrained=True, cache_dir=tmp_path / "mine")
    assert_same(model.backbone, weights)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["convnext.pth"]
    assert model.pretrained_cfg["url"] == url


@pytest.mark.parametrize("kind", [dict, PretrainedCfg])
def test_a_given_cfg_names_other_weights_of_the_backbone(hub, kind):
    resnet, finetuned = hub.publish(RESNET), hub.publish("user/finetuned", "test_convnext", seed=5)
    cfg = kind(hf_hub_id="user/finetuned", mean=(0.1, 0.2, 0.3))
    model = create(pretrained=True, pretrained_cfg=cfg)
    assert_same(model.backbone, finetuned)
    assert_same(model.attention_net.trunk, resnet)
    model = timm.create_model("isqrt_cov", backbone="test_convnext", pretrained=True, pretrained_cfg=cfg)
    assert_same(model.backbone, finetuned)
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3) and model.pretrained_cfg["architecture"] == "isqrt_cov"
    assert hub.asked == {"user/finetuned", RESNET}


def test_an_overlay_without_a_source_leaves_the_source(hub):
    convnext, _ = hub.publish(CONVNEXT), hub.publish(RESNET)
    model = create(pretrained=True, pretrained_cfg_overlay=dict(mean=(0.1, 0.2, 0.3)))
    assert_same(model.backbone, convnext)
    assert model.pretrained_cfg["mean"] == (0.1, 0.2, 0.3)


def test_a_cfg_without_a_source_is_told(hub):
    with pytest.raises(RuntimeError, match="No pretrained weights exist for tasn. Use `pretrained=False`"):
        create(pretrained=True, pretrained_cfg=dict(mean=(0.1, 0.2, 0.3)))
    assert not hub.requests


# Our own weights


@pytest.fixture
def own(tmp_path):
    """A model of ours whose backbones have ImageNet weights or not, and the folder that it was saved in."""

    def build(**kwargs):
        model = timm.create_model("tasn", **kwargs)
        model.load_state_dict(random_state(model, 3))
        names = [str(index) for index in range(model.num_classes)]
        save_folder(model, tmp_path / "best", label_names=names, data_config={})
        return model.state_dict(), tmp_path / "best"

    return build


@pytest.mark.parametrize("arguments", [TASN, OWN], ids=["backbones with weights", "without"])
@pytest.mark.parametrize("kind", ["local-dir", "hf-hub", "file", "hub", "memory", "cfg", "checkpoint_path"])
def test_our_own_weights_are_loaded_without_any_others(hub, own, kind, arguments):
    state, folder = own(**arguments)
    hub.publish_folder("user/birds", folder)
    weights, classes = str(folder / "model.safetensors"), dict(num_classes=arguments["num_classes"])
    name, kwargs = {
        "local-dir": (f"local-dir:{folder}", {}),
        "hf-hub": ("hf-hub:user/birds", {}),
        "file": ("tasn", dict(pretrained_cfg_overlay=dict(file=weights, license="mit") | classes)),
        "hub": ("tasn", dict(pretrained_cfg_overlay=dict(hf_hub_id="user/birds") | classes)),
        "memory": ("tasn", dict(pretrained_cfg_overlay=dict(state_dict=state) | classes)),
        "cfg": ("tasn", dict(pretrained_cfg=dict(hf_hub_id="user/birds") | classes)),
        "checkpoint_path": ("tasn", dict(pretrained=False, checkpoint_path=weights)),
    }[kind]
    model = timm.create_model(name, **dict(pretrained=True) | kwargs, **arguments if name == "tasn" else {})
    assert {key: torch.equal(value, state[key]) for key, value in model.state_dict().items()} == dict.fromkeys(
        state, True
    )
    if "pretrained_cfg_overlay" in kwargs:
        assert model.pretrained_cfg.get("license") == kwargs["pretrained_cfg_overlay"].get("license")
    assert hub.asked == ({"user/birds"} if kind in ("hf-hub", "hub", "cfg") else set())


@pytest.mark.parametrize("in_chans", [1, 4])
def test_our_own_weights_with_other_channels_and_classes(hub, own, in_chans):
    state, folder = own(**OWN)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=in_chans, num_classes=5)
    for stem in ("attention_net.trunk.stem_conv1.conv", "backbone.conv1.0"):
        state = adapted(state, stem, in_chans)
    for name, value in model.state_dict().items():
        new = name.startswith(("heads.", "attention_net.classifier."))
        assert value.shape[0] == 5 if new else torch.equal(value, state[name]), name
    assert not hub.requests


def test_our_own_weights_are_cached_in_cache_dir_and_need_no_hub_then(hub, own, offline, tmp_path):
    state, folder = own(**TASN)
    hub.publish_folder("user/birds", folder)
    timm.create_model("hf-hub:user/birds", pretrained=True, cache_dir=tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").glob("models--*")] == ["models--user--birds"]
    assert not (tmp_path / "hub").exists()
    offline()
    model = timm.create_model("hf-hub:user/birds", pretrained=True, cache_dir=tmp_path / "mine")
    assert torch.equal(model.heads.shared.weight, state["heads.shared.weight"])


def test_the_shipped_checkpoint_asks_for_nothing(hub):
    timm.create_model("tasn_tiny", pretrained=True, num_classes=7, in_chans=1)
    assert not hub.requests
