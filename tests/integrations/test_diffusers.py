"""diffusers' models under patch(model): the same numbers, every attention call served. Tiny and random, nothing is loaded.

Its registry of attention backends takes the names of an enumeration alone; the "native" one calls F.sdpa, and so do its older
processors, which is where patch() serves.
"""

from __future__ import annotations

import copy

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")

from fakes import FAST, Clock, add, honest, made_up, turn

import fastattn

pytestmark = pytest.mark.usefixtures("one_thread")
UNET = {
    "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 8, "in_channels": 4, "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
}  # fmt: skip
SDXL = {
    "cross_attention_dim": 64, "attention_head_dim": (2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8, "transformer_layers_per_block": (1, 2), "projection_class_embeddings_input_dim": 80,
}  # fmt: skip
FLUX = {
    "patch_size": 1, "in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
SD3 = {
    "sample_size": 8, "patch_size": 1, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 4,
    "caption_projection_dim": 32, "joint_attention_dim": 32, "pooled_projection_dim": 64, "out_channels": 4,
}  # fmt: skip
VAE = {
    "block_out_channels": (32,), "down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",),
    "latent_channels": 4, "norm_num_groups": 8,
}  # fmt: skip
r = torch.randn
image, text = r(2, 4, 8, 8), r(2, 7, 32)
step = torch.tensor([3.0])
MODELS = {
    # (class, its config, inputs, calls of attention)
    "UNet of Stable Diffusion": (
        "UNet2DConditionModel", UNET | {"cross_attention_dim": 32, "attention_head_dim": 8},
        {"sample": image, "timestep": step, "encoder_hidden_states": text}, 8,
    ),
    "UNet of SDXL": (
        "UNet2DConditionModel", UNET | SDXL,
        {"sample": image, "timestep": step, "encoder_hidden_states": r(2, 7, 64),
         "added_cond_kwargs": {"text_embeds": r(2, 32), "time_ids": r(2, 6)}}, 16,
    ),
    "a padded prompt": (
        "UNet2DConditionModel", UNET | {"cross_attention_dim": 32, "attention_head_dim": 8},
        {"sample": image, "timestep": step, "encoder_hidden_states": text,
         "encoder_attention_mask": torch.arange(7)[None] < torch.tensor([[7], [4]])}, 8,
    ),
    "Flux": (
        "FluxTransformer2DModel", FLUX,
        {"hidden_states": r(1, 16, 4), "encoder_hidden_states": r(1, 8, 32), "pooled_projections": r(1, 32),
         "timestep": step, "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(8, 3)}, 2,
    ),
    "Stable Diffusion 3": (
        "SD3Transformer2DModel", SD3,
        {"hidden_states": image, "encoder_hidden_states": text, "pooled_projections": r(2, 64), "timestep": step}, 2,
    ),
    "autoencoder": ("AutoencoderKL", VAE, {"sample": r(1, 3, 16, 16)}, 2),
}  # fmt: skip


def built(name):
    kind, config, given, calls = MODELS[name]
    torch.manual_seed(0)
    return getattr(diffusers, kind)(**config).eval(), given, calls


def double(given):
    if isinstance(given, dict):
        return {name: double(x) for name, x in given.items()}
    return given.double() if given.is_floating_point() else given


def run(model, given):
    """The output, and the gradient of its sum of squares for the first parameter that has one."""
    out = model(**given, return_dict=False)[0]
    first = next(p for name, p in model.named_parameters() if "to_q" in name)
    return out, torch.autograd.grad(out.square().sum(), first)[0]


@pytest.fixture(autouse=True)
def counted_anew():
    fastattn.stats.reset()


@pytest.mark.parametrize("name", MODELS)
def test_untuned_the_bits_are_those_of_stock(name, untuned):
    model, given, calls = built(name)
    want = run(model, given)
    with fastattn.patch(model):
        for ours, theirs in zip(run(model, given), want, strict=True):
            assert torch.equal(ours, theirs)
    assert fastattn.stats()["calls"] == calls and not fastattn.stats()["passed_on"]


@pytest.mark.parametrize("name", MODELS)
def test_every_call_is_served_by_what_won_within_the_budget(name, monkeypatch):
    """The gate's rule for float32: four times the error that stock has, and the last bits."""
    add(monkeypatch, made_up("quick", honest))
    turn(monkeypatch, Clock({"default": 4e-3, "quick": FAST}))
    model, given, calls = built(name)
    stock, exact = run(model, given), run(copy.deepcopy(model).double(), double(given))
    with fastattn.patch(model):
        found = run(model, given)
    assert fastattn.stats()["served_by"] == {"quick": calls}
    for ours, theirs, reference in zip(found, stock, exact, strict=True):
        budget = (theirs.double() - reference).abs().max() + 2**-23 * reference.abs().max()
        assert (ours.double() - reference).abs().max() <= 4 * budget


def test_a_part_of_a_pipeline_alone(untuned):
    """What is patched is the denoiser; the autoencoder beside it is stock."""
    unet, given, calls = built("UNet of Stable Diffusion")
    vae, image, _ = built("autoencoder")
    with fastattn.patch(unet), torch.no_grad():
        unet(**given)
        vae(**image)
    assert fastattn.stats()["calls"] == calls


def test_the_autoencoders_own_methods_reach_its_parts(untuned):
    vae, _, _ = built("autoencoder")
    with fastattn.patch(vae), torch.no_grad():
        vae.decode(vae.encode(r(1, 3, 16, 16)).latent_dist.mode())
    assert fastattn.stats()["calls"] == 2


def test_the_report_names_the_layers(untuned):
    model, given, calls = built("Flux")
    layers = {at for row in fastattn.report(model, **given).rows for at in row.layers}
    assert layers == {"transformer_blocks.0.attn", "single_transformer_blocks.0.attn"}
