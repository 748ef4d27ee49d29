"""The IP-Adapter: keys and values of pictures in every cross-attention."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from key_lists import key_list, sparse_safetensors
from tiny_models import encode, inputs, randomize, tiny
from torch import Tensor

from hydit_core.errors import WeightsError
from hydit_core.facts import ModelInfo
from hydit_core.model.attention import ImageContext
from hydit_core.model.config import DiTConfig
from hydit_core.model.controlnet import ControlNet
from hydit_core.model.dit import DiT
from hydit_core.model.ip_adapter import IPAdapter, IPAdapterConfig
from hydit_core.model.rope import rope_table
from hydit_core.weights.convert import convert
from hydit_core.weights.detect import detect
from hydit_core.weights.files import open_tensors
from hydit_core.weights.load import load_dit, load_ip_adapter
from hydit_core.weights.save import save_ip_adapter

CONFIG = tiny(depth=4, hidden=32, heads=2)
EMBED = 12


@pytest.fixture(scope="module")
def dit() -> DiT:
    model = DiT(CONFIG)
    randomize(model, 1)
    return model.eval()


def adapter(seed: int = 2, tokens: int = 3) -> IPAdapter:
    net = IPAdapter(IPAdapterConfig.for_dit(CONFIG, EMBED, tokens))
    randomize(net, seed)
    return net.eval()


def embedding(seed: int, rows: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(rows, EMBED, generator=generator))


def of(net: IPAdapter, embeddings: Tensor) -> list[ImageContext]:
    with torch.no_grad():
        return [ImageContext((one,)) for one in net(embeddings)]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * weight + bias


def written_out(
    dit: DiT, net: IPAdapter, block: int, x: Tensor, text: Tensor, pictures: list[tuple[float, Tensor]]
) -> Tensor:
    """Cross-attention of Tencent's flash path in float64, head by head, by the names of the files."""
    w = {name: value.double() for name, value in {**dit.state_dict(), **net.state_dict()}.items()}
    here = f"blocks.{block}.attn2."
    width, heads = CONFIG.hidden_size, CONFIG.num_heads
    size = width // heads
    x, text = x.double(), text.double()

    def norm(values: Tensor, name: str) -> Tensor:
        return layer_norm(values, w[f"{here}{name}.weight"], w[f"{here}{name}.bias"], 1e-6)

    cos, sin = (table.double() for table in rope_table(4, 6, size))
    q = x @ w[f"{here}q_proj.weight"].T + w[f"{here}q_proj.bias"]
    kv = text @ w[f"{here}kv_proj.weight"].T + w[f"{here}kv_proj.bias"]
    sets = [(1.0, kv, "k_norm")]
    for scale, image in pictures:
        wide = image.double() @ w["ip_adapter_clip_len_trans_block.weight"].T
        wide = (wide + w["ip_adapter_clip_len_trans_block.bias"]).reshape(len(image), CONFIG.text_dim, -1)
        name = "ip_adapter_img_norm_cond"
        tokens = layer_norm(wide.transpose(1, 2), w[f"{name}.weight"], w[f"{name}.bias"], 1e-5)
        kv = tokens @ w[f"{here}kv_proj_ip_adapter.weight"].T + w[f"{here}kv_proj_ip_adapter.bias"]
        sets.append((scale, kv, "k_norm_ip_adapter"))
    total = torch.zeros_like(x)
    for scale, kv, name in sets:
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            queries = norm(q[..., columns], "q_norm")
            even, odd = queries[..., 0::2], queries[..., 1::2]
            turned = torch.stack((-odd, even), -1).flatten(-2)
            queries = queries * cos + turned * sin
            keys = norm(kv[..., :width][..., columns], name)
            scores = queries @ keys.transpose(1, 2) / size**0.5
            total[..., columns] += scale * scores.softmax(-1) @ kv[..., width:][..., columns]
    return total @ w[f"{here}out_proj.weight"].T + w[f"{here}out_proj.bias"]


@pytest.mark.parametrize(
    "packed",
    [
        lambda dit, net: {**dit, **net},
        lambda dit, net: {"module": {**dit, **net}, "lr": 1},
        lambda dit, net: {"ema": {**dit, **net}, "module": dit},
        lambda dit, net: {f"module.{name}": value for name, value in {**dit, **net}.items()},
        lambda dit, net: {f"model.diffusion_model.{name}": value for name, value in {**dit, **net}.items()},
        lambda dit, net: {**dit, **{f"ip_adapter.{name}": value for name, value in net.items()}},
    ],
    ids=["flat", "module", "ema", "DDP", "comfy", "apart"],
)
def test_a_checkpoint_with_one_inside(packed, dit: DiT, tmp_path: Path) -> None:
    """The DiT is loaded without it; given as the IP-Adapter, the file gives that."""
    net = adapter()
    torch.save(packed(dit.state_dict(), net.state_dict()), tmp_path / "both.pt")
    kind = detect(open_tensors(tmp_path / "both.pt"))
    assert kind.kind == "dit" and kind.name.endswith("checkpoint with an IP-Adapter inside")
    assert "as the IP-Adapter too" in kind.advice
    for found, given in (
        (load_dit(tmp_path / "both.pt")[0], dit),
        (load_ip_adapter(tmp_path / "both.pt"), net),
    ):
        state = found.state_dict()
        assert state.keys() == given.state_dict().keys()
        assert all(torch.equal(state[name], value) for name, value in given.state_dict().items())
    written = convert(tmp_path / "both.pt", tmp_path / "dit.safetensors", layout="tencent")
    assert written.notes == ("left out: its IP-Adapter (to draw with it, give the input as that)",)
    assert detect(open_tensors(tmp_path / "dit.safetensors")).name.endswith("checkpoint")


def test_the_published_names_of_both_in_one_file(tmp_path: Path) -> None:
    sparse_safetensors(tmp_path / "both.safetensors", {**key_list("g2_v12"), **key_list("ipa_extra")})
    kind = detect(open_tensors(tmp_path / "both.safetensors"))
    assert kind.name == "a HunyuanDiT-g/2 v1.2 checkpoint with an IP-Adapter inside"
    model, _ = load_dit(tmp_path / "both.safetensors", device="meta")
    assert model.config == DiTConfig() and len(model.state_dict()) == len(key_list("g2_v12"))
    assert len(load_ip_adapter(tmp_path / "both.safetensors", device="meta").state_dict()) == 164


def test_what_is_neither_is_named(dit: DiT, tmp_path: Path) -> None:
    torch.save({**dit.state_dict(), "img_proj.weight": torch.zeros(2, 2)}, tmp_path / "more.pt")
    with pytest.raises(WeightsError, match=r"tensors 1 unexpected: img_proj\.weight"):
        load_dit(tmp_path / "more.pt")


def test_the_formula(dit: DiT) -> None:
    net, x, text = adapter(), torch.randn(2, 24, 32), torch.randn(2, 9, CONFIG.text_dim)
    one, two = embedding(3), embedding(4)
    rope = rope_table(4, 6, CONFIG.head_dim)
    for block in (0, 3):
        attended = [net(one)[block], net(two)[block]]
        attended[1] = attended[1]._replace(values=0.4 * attended[1].values)
        with torch.no_grad():
            found = dit.blocks[block].attn2(x, text, rope, images=ImageContext(attended))
        expected = written_out(dit, net, block, x, text, [(1.0, one), (0.4, two)])
        assert (found - expected).abs().max() < 1e-5 * expected.std()


def test_text_scale_and_mask(dit: DiT) -> None:
    """What each adds, before the last projection."""
    attn2, net = dit.blocks[1].attn2, adapter()
    x, text, rope = torch.randn(2, 24, 32), torch.randn(2, 9, CONFIG.text_dim), rope_table(4, 6, 16)
    seen: list[Tensor] = []
    hook = attn2.out_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    mask = torch.rand(1, 24, 1)
    picture = net(embedding(3))[1]
    with torch.no_grad():
        attn2(x, text, rope)
        attn2(x, text, rope, images=ImageContext((picture,), text_scale=0.0))
        attn2(x, text, rope, images=ImageContext((picture._replace(mask=mask),), text_scale=0.7))
    hook.remove()
    plain, alone, both = seen
    torch.testing.assert_close(both, 0.7 * plain + mask * alone)


def test_the_whole_model(dit: DiT) -> None:
    """Block i gets what is for block i; pictures change rows of their own only."""
    values = inputs(CONFIG, (8, 12))
    net, context = adapter(), encode(dit, values)
    images = of(net, embedding(3))
    with torch.no_grad():
        plain = dit(values["x"], values["t"], context)
        steered = dit(values["x"], values["t"], context, images=images)
        turned = dit(values["x"], values["t"], context, images=images[::-1])
        alone = dit(values["x"][1:], values["t"][1:], context.last(1), images=of(net, embedding(3)[1:]))
    assert (plain != steered).any() and (steered != turned).any()
    torch.testing.assert_close(steered[1:], alone, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="3 blocks; this model has 4"):
        dit(values["x"], values["t"], context, images=images[:3])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits(dit: DiT, dtype: torch.dtype) -> None:
    model = DiT(CONFIG, dtype=dtype)
    model.load_state_dict({name: value.to(dtype) for name, value in dit.state_dict().items()})
    values = inputs(CONFIG, (8, 12))
    with torch.no_grad():
        context = encode(model, {k: v.to(dtype) if v.is_floating_point() else v for k, v in values.items()})
        exact = dit(values["x"], values["t"], encode(dit, values), images=of(adapter(), embedding(3)))
        images = of(adapter().to(dtype), embedding(3).to(dtype))
        found = model(values["x"].to(dtype), values["t"], context, images=images)
    assert found.isfinite().all()
    assert (found.float() - exact).std() < (0.02 if dtype == torch.float16 else 0.1) * exact.std()


def test_gradients_reach_every_tensor(dit: DiT) -> None:
    """With activations computed again in the backward pass, too."""
    values, gradients = inputs(CONFIG, (8, 12)), []
    for fraction in (0.0, 1.0):
        net = adapter()
        dit.gradient_checkpointing = fraction
        images = [ImageContext((one,)) for one in net(embedding(3))]
        dit(values["x"], values["t"], encode(dit, values), images=images).square().mean().backward()
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    dit.gradient_checkpointing = 0.0
    dit.zero_grad()
    for name, gradient in gradients[0].items():
        assert gradient is not None and gradient.abs().max() > 0, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_new_one_changes_nothing(dit: DiT) -> None:
    net = IPAdapter(IPAdapterConfig.for_dit(CONFIG, EMBED))
    net.initialize(torch.Generator().manual_seed(0))
    values = inputs(CONFIG, (8, 12))
    context = encode(dit, values)
    with torch.no_grad():
        plain = dit(values["x"], values["t"], context)
        assert torch.equal(dit(values["x"], values["t"], context, images=of(net, embedding(3))), plain)
    assert all((weight != 0).any() for name, weight in net.named_parameters() if name.endswith("weight"))


def test_dimensions_of_the_published_one() -> None:
    """164 tensors with 123,861,888 parameters (Tencent's ipa.pt)."""
    net = IPAdapter(IPAdapterConfig(), device="meta")
    shapes = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert len(shapes) == 164 and sum(p.numel() for p in net.parameters()) == 123_861_888
    assert shapes["ip_adapter_clip_len_trans_block.weight"] == (8192, 1024)
    assert shapes["ip_adapter_img_norm_cond.bias"] == (1024,)
    assert shapes["blocks.39.attn2.kv_proj_ip_adapter.weight"] == (2816, 1024)
    assert shapes["blocks.39.attn2.k_norm_ip_adapter.bias"] == (88,)
    assert IPAdapterConfig.from_state_dict(shapes) == IPAdapterConfig()
    other = IPAdapterConfig(96, 6, 4, embed_dim=20, num_tokens=5, token_dim=24)
    assert IPAdapterConfig.from_state_dict(IPAdapter(other, device="meta").state_dict()) == other


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("ip_adapter_clip_len_trans_block.weight", None, "ip_adapter_clip_len_trans_block.weight is missing"),
        ("ip_adapter_img_norm_cond.weight", (25,), "neither may have a remainder"),
        ("ip_adapter_img_norm_cond.weight", (1, 24), "expected 1 dimension"),
        ("blocks.0.attn2.k_norm_ip_adapter.weight", (7,), "neither may have a remainder"),
        ("blocks.0.attn2.kv_proj_ip_adapter.weight", (0, 24), "holds nothing"),
    ],
)
def test_shapes_that_contradict_each_other(name: str, shape: tuple[int, ...] | None, said: str) -> None:
    shapes = {key: tuple(value.shape) for key, value in adapter().state_dict().items()}
    shapes[name] = shape
    if shape is None:
        del shapes[name]
    with pytest.raises(WeightsError, match=said):
        IPAdapterConfig.from_state_dict(shapes)


def saved(net: IPAdapter, path: Path, prefix: str = "", **more: Tensor) -> Path:
    torch.save({**{prefix + name: value for name, value in net.state_dict().items()}, **more}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module.", "model.diffusion_model.", "transformer."])
def test_files_are_read(tmp_path: Path, prefix: str) -> None:
    """Tencent's flat ``ipa.pt``, safetensors, and a checkpoint with one inside."""
    net = adapter()
    files = [saved(net, tmp_path / "ipa.pt", prefix)]
    save_ip_adapter(tmp_path / "ipa.safetensors", net.state_dict(), ModelInfo.published("v1.2"))
    files.append(tmp_path / "ipa.safetensors")
    files.append(saved(net, tmp_path / "whole.pt", prefix, **DiT(CONFIG).state_dict()))
    for path in files:
        read = load_ip_adapter(path)
        assert read.config == net.config and not read.training
        for name, value in net.state_dict().items():
            assert torch.equal(read.state_dict()[name], value), (path, name)
    assert load_ip_adapter(files[0], dtype=torch.bfloat16).dtype == torch.bfloat16
    assert detect(open_tensors(files[0])).name == "a HunyuanDiT-32x4 IP-Adapter"
    assert open_tensors(files[1]).metadata["modelspec.architecture"] == "hunyuan-dit/ip-adapter"


def test_files_that_are_none(tmp_path: Path) -> None:
    """One line that says what is there and what was expected."""
    whole = adapter().state_dict()
    lacking = {name: value for name, value in whole.items() if "2.attn2.k_norm" not in name}
    gap = {name: value for name, value in whole.items() if "blocks.1." not in name}
    wide = {**whole, "blocks.3.attn2.kv_proj_ip_adapter.weight": torch.zeros(64, 7)}
    base = DiT(CONFIG).state_dict()
    net = ControlNet(CONFIG).state_dict()
    bert = {
        "embeddings.word_embeddings.weight": torch.zeros(9, 8),
        "encoder.layer.0.attention.self.query.weight": torch.zeros(8, 8),
    }
    for tensors, said in (
        (lacking, "2 missing: blocks.2.attn2.k_norm_ip_adapter.weight"),
        (gap, "blocks.1 is missing"),
        (wide, "kv_proj_ip_adapter.weight (64, 7) instead of (64, 24)"),
        (base, "a HunyuanDiT-32x4 v1.2 checkpoint; expected a HunyuanDiT IP-Adapter; give it as the model"),
        (net, "ControlNet; expected a HunyuanDiT IP-Adapter"),
        (bert, "a BERT text encoder (width 8, vocabulary 9); expected a HunyuanDiT IP-Adapter"),
        ({"ip_adapter.1.to_k_ip.weight": torch.zeros(3, 3)}, "an IP-Adapter for Stable Diffusion; expected"),
    ):
        torch.save(tensors, tmp_path / "file.pt")
        with pytest.raises(WeightsError, match=re.escape(said)) as caught:
            load_ip_adapter(tmp_path / "file.pt")
        assert "\n" not in str(caught.value) and "file.pt" in str(caught.value)
