"""What other packs change in the layers that pruning leaves out, and what becomes of pruning.

Every stand-in changes the host as a pack does, around sampling or, as AnimateDiff-Evolved's motion
models do, while the U-Net runs. Then pruned must equal full convolutions with masked output under
the same change, or the block must run as it is, to the bit; and either way the run says so.
"""

from __future__ import annotations

import contextlib
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from features import Kit
from torch import nn
from torch.nn.modules import module as torch_module

pytestmark = pytest.mark.comfyui
BLOCK = ("mid_block.resnets.0.conv1", "mid_block.resnets.0.conv2")
FRAMES, TOLERANCE = 4, 1e-6
FEED_FORWARD = ("mid_block.attentions.0.transformer_blocks.0.ff.net.0",)


@pytest.fixture(scope="module")
def kit(comfy, small_model, conditioning, tmp_path_factory):
    return Kit(comfy, small_model, conditioning, tmp_path_factory.mktemp("loras"))


@contextlib.contextmanager
def replaced(owner, name, make):
    """``make`` gets what was there. An attribute that a module did not have is gone again after."""
    own, earlier = vars(owner).get(name), getattr(owner, name)
    setattr(owner, name, make(earlier))
    try:
        yield
    finally:
        if isinstance(owner, nn.Module) and own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, earlier)


@contextlib.contextmanager
def hooked(register):
    handle = register(lambda module, inputs, output: 1.25 * output)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def hooked_before(register):
    handle = register(lambda module, inputs: (1.25 * inputs[0], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def louder(earlier):
    return lambda *args, **kwargs: 1.25 * earlier(*args, **kwargs)


def over_frames(earlier):
    """A group norm's statistics over all frames, as the motion models of AnimateDiff v1 want."""

    def forward(self, x):
        together = x.movedim(0, 1).flatten(1)[None]
        normed = F.group_norm(together, self.num_groups, None, None, self.eps)
        normed = normed[0].unflatten(1, (len(x), *x.shape[2:])).movedim(1, 0)
        return normed * self.weight[:, None, None] + self.bias[:, None, None]

    return forward


def tiled(earlier):
    """Seamless tiling, for a convolution or for all of them."""

    def forward(self, x, weight, bias):
        if weight.shape[-1] == 1:
            return earlier(self, x, weight, bias)
        return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias, self.stride)

    return forward


@contextlib.contextmanager
def frames_normed_together(unet):
    ops = __import__("comfy.ops").ops.disable_weight_init.GroupNorm
    with replaced(nn.GroupNorm, "forward", over_frames):
        with replaced(ops, "forward_comfy_cast_weights", over_frames):
            yield


def conv(unet, place="out_layers.3"):
    return unet.get_submodule(f"middle_block.0.{place}")


@contextlib.contextmanager
def in_the_place_of(container, index, module):
    earlier, container[index] = container[index], module
    try:
        yield
    finally:
        container[index] = earlier


@contextlib.contextmanager
def dilated(unet):
    """As packs for large images do, in some steps."""
    layer = conv(unet)
    layer.dilation = layer.padding = (2, 2)
    try:
        yield
    finally:
        layer.dilation = layer.padding = (1, 1)


@contextlib.contextmanager
def cast_louder(unet):
    """A norm whose weights the host casts, in a method that the norm has of its own."""
    norm = conv(unet, "out_layers.0")
    with replaced(norm, "comfy_cast_weights", lambda earlier: True):
        with replaced(norm, "forward_comfy_cast_weights", louder):
            yield


class Halved(nn.Module):
    def forward(self, x):
        return 0.5 * x


@contextlib.contextmanager
def one_more(container):
    """A layer before the last."""
    last = container[-1]
    container[len(container) - 1] = Halved()
    container.append(last)
    try:
        yield
    finally:
        del container[-1]
        container[len(container) - 1] = last


@contextlib.contextmanager
def weight_normed(unet):
    before = conv(unet).weight.detach().clone()
    nn.utils.weight_norm(conv(unet))
    try:
        yield
    finally:
        nn.utils.remove_weight_norm(conv(unet))
        conv(unet).weight.data.copy_(before)


@contextlib.contextmanager
def parametrized(unet):
    nn.utils.parametrize.register_parametrization(conv(unet), "weight", Halved())
    try:
        yield
    finally:
        nn.utils.parametrize.remove_parametrizations(conv(unet), "weight", False)


class Watching(torch.utils._python_dispatch.TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def middle(unet):
    return unet.middle_block[0]


def feed_forward(unet):
    return unet.get_submodule("middle_block.1.transformer_blocks.0.ff")


def bound(unet, name, make):
    """The change of a method on one convolution alone."""
    layer = conv(unet)
    return replaced(layer, name, lambda earlier: partial(make(getattr(type(layer), name)), layer))


ROWS = {
    "GroupNorm of the class": frames_normed_together,
    "GroupNorm of one block": lambda u: replaced(conv(u, "out_layers.0"), "forward", louder),
    "a hook on a norm": lambda u: hooked(conv(u, "out_layers.0").register_forward_hook),
    "F.group_norm": lambda u: replaced(F, "group_norm", louder),
    "F.silu": lambda u: replaced(F, "silu", louder),
    "a hook on an activation": lambda u: hooked(conv(u, "out_layers.1").register_forward_hook),
    "tiling of one convolution": lambda u: bound(u, "_conv_forward", tiled),
    "tiling of all convolutions": lambda u: replaced(nn.Conv2d, "_conv_forward", tiled),
    "dilation": dilated,
    "a norm's casting": cast_louder,
    "another activation": lambda u: in_the_place_of(middle(u).out_layers, 1, nn.ReLU()),
    "another norm": lambda u: in_the_place_of(middle(u).out_layers, 0, Halved()),
    "no dropout": lambda u: in_the_place_of(middle(u).out_layers, 2, Halved()),
}
#: then it is a layer that the run does not know
DURING_THE_RUN = {"another activation", "another norm", "no dropout"}
#: a model in which it lies before the run is refused, with a message
REFUSED = {"a layer around a convolution", "a layer around a linear one", "one more linear layer"}
AS_IT_IS = {
    "Conv2d of the class": lambda u: replaced(nn.Conv2d, "forward", louder),
    "a convolution's forward": lambda u: replaced(conv(u), "forward", louder),
    "a convolution's operation": lambda u: replaced(conv(u), "_conv_forward", louder),
    "all convolutions' operation": lambda u: replaced(nn.Conv2d, "_conv_forward", louder),
    "F.conv2d": lambda u: replaced(F, "conv2d", louder),
    "a convolution's call": lambda u: replaced(conv(u), "_call_impl", louder),
    "a hook on a convolution": lambda u: hooked(conv(u).register_forward_hook),
    "a hook on all modules": lambda u: hooked(torch_module.register_module_forward_hook),
    "a hook before all modules": lambda u: hooked_before(
        torch_module.register_module_forward_pre_hook
    ),
    "a hook on a container": lambda u: hooked(middle(u).in_layers.register_forward_hook),
    "ResBlock of the class": lambda u: replaced(type(middle(u)), "_forward", louder),
    "weight_norm": weight_normed,
    "one more layer": lambda u: one_more(middle(u).out_layers),
    "a layer around a convolution": lambda u: in_the_place_of(
        middle(u).out_layers, 3, nn.Sequential(conv(u), Halved())
    ),
}
FEED_FORWARDS = {
    "Linear of the class": lambda u: replaced(nn.Linear, "forward", louder),
    "F.gelu": lambda u: replaced(F, "gelu", louder),
    "a hook on the gate": lambda u: hooked(feed_forward(u).net[0].register_forward_hook),
    "a linear layer": lambda u: replaced(feed_forward(u).net[2], "forward", louder),
    "a layer around a linear one": lambda u: in_the_place_of(
        feed_forward(u).net, 2, nn.Sequential(feed_forward(u).net[2], Halved())
    ),
    "one more linear layer": lambda u: one_more(feed_forward(u).net),
    "FeedForward of the class": lambda u: replaced(type(feed_forward(u)), "forward", louder),
}
NO_CHANGE = {"a parametrization": parametrized, "a dispatch mode": lambda u: Watching()}


@pytest.fixture
def sampled(comfy, kit):
    """Sample ``FRAMES`` images in one step with a change, made outside of the U-Net or inside."""

    def run(model, change=lambda unet: contextlib.nullcontext(), inside=False):
        model, unet = model.clone(), model.model.diffusion_model

        def wrapper(executor, *args, **kwargs):
            with change(unet):
                return executor(*args, **kwargs)

        graph = kit.graph(model)
        graph.settings.update(steps=1, cfg=1.0)
        graph.latent = {"samples": torch.zeros(FRAMES, 4, 8, 16)}
        if inside:
            kind = comfy.root.patcher_extension.WrappersMP.DIFFUSION_MODEL
            model.add_wrapper_with_key(kind, "test", wrapper)
            return kit.sample(graph)
        with change(unet):
            return kit.sample(graph)

    return run


@pytest.fixture(scope="module")
def unpruned(small_model):
    return small_model()


@pytest.fixture
def pruned(comfy, unpruned, make_gates):
    def make(sites=BLOCK):
        gates = make_gates(sites, constants=20.0)
        return comfy.patch.attach(unpruned, comfy.patch.Layer(gates, gates.keep_sets())), gates

    return make


def apart(one, other):
    return float((one - other).norm() / other.norm())


WHERE = {"around": False, "inside": True}
ROWS_WHERE = [(c, w) for c in ROWS for w in WHERE if w == "around" or c not in DURING_THE_RUN]
AS_IT_IS_WHERE = [(c, w) for c in AS_IT_IS for w in WHERE if w == "inside" or c not in REFUSED]
AS_IT_IS_WHERE += [(c, "inside") for c in DURING_THE_RUN]
FEED_WHERE = [(c, w) for c in FEED_FORWARDS for w in WHERE if w == "inside" or c not in REFUSED]


@pytest.mark.parametrize(("change", "where"), ROWS_WHERE)
def test_a_changed_norm_or_border_costs_savings_alone_and_the_run_says_so(
    comfy, unpruned, pruned, masked, sampled, change, where
):
    model, gates = pruned()
    change, inside = ROWS[change], WHERE[where]
    with masked(unpruned, gates):
        expected = sampled(unpruned, change, inside)
    assert apart(sampled(unpruned, change, inside), expected) > 100 * TOLERANCE
    assert apart(sampled(model, change, inside), expected) <= TOLERANCE
    record = comfy.patch.attached(model).record
    assert record.pruned_evaluations == record.evaluations == 1
    (note,) = record.notes
    assert note.startswith(
        "mid_block.resnets.0 runs with a part of the savings, because another node or extension has"
    )


@pytest.mark.parametrize(("change", "where"), AS_IT_IS_WHERE)
def test_a_block_with_other_changes_runs_as_it_is_and_the_run_says_so(
    comfy, unpruned, pruned, sampled, change, where
):
    model, _ = pruned()
    change, inside = (ROWS | AS_IT_IS)[change], WHERE[where]
    assert torch.equal(sampled(model, change, inside), sampled(unpruned, change, inside))
    record = comfy.patch.attached(model).record
    (note,) = record.notes
    assert note.startswith("mid_block.resnets.0 runs unpruned, because ")
    assert (record.evaluations, record.pruned_evaluations) == (1, 0)


@pytest.mark.parametrize(("change", "where"), FEED_WHERE)
def test_a_changed_feed_forward_runs_as_it_is_and_the_run_says_so(
    comfy, unpruned, pruned, sampled, change, where
):
    model, _ = pruned(FEED_FORWARD)
    change, inside = FEED_FORWARDS[change], WHERE[where]
    assert torch.equal(sampled(model, change, inside), sampled(unpruned, change, inside))
    (note,) = comfy.patch.attached(model).record.notes
    assert "transformer_blocks.0.ff runs unpruned, because another node or extension" in note


@pytest.mark.parametrize("change", sorted(REFUSED))
def test_a_block_that_a_pack_rebuilds_when_the_model_is_loaded_runs_as_it_is(
    comfy, unpruned, pruned, kit, change
):
    """Behind the Apply node, by an injection of ComfyUI; a model rebuilt before it is refused."""
    found, gates = pruned((*BLOCK, *FEED_FORWARD))
    rebuilt = FEED_FORWARD if change in FEED_FORWARDS else BLOCK
    others = {site: kept for site, kept in gates.keep_sets().items() if site not in rebuilt}
    alone = comfy.patch.attach(unpruned, comfy.patch.Layer(gates, others))
    unet, stack = unpruned.model.diffusion_model, contextlib.ExitStack()
    injection = comfy.root.patcher_extension.PatcherInjection(
        inject=lambda _: stack.enter_context((AS_IT_IS | FEED_FORWARDS)[change](unet)),
        eject=lambda _: stack.close(),
    )
    latents = []
    with stack:
        for model in (unpruned.clone(), found, alone):
            model.set_injections("test", [injection])
            latents.append(kit.sample(kit.graph(model)))
            model.detach()
    dense, latent, other = latents
    assert torch.equal(latent, other) and not torch.equal(latent, dense)
    (note,) = comfy.patch.attached(found).record.notes
    (block,) = comfy.core.blocks_of(rebuilt)
    assert note.startswith(f"{block} runs unpruned, because it is a ")


def test_a_rebuilt_block_that_the_chosen_sites_leave_out_is_no_obstacle(
    comfy, small_model, make_gates, kit
):
    model, gates = small_model(), make_gates((*BLOCK, *FEED_FORWARD))
    change, apply = AS_IT_IS["a layer around a convolution"], comfy.apply_node
    with change(model.model.diffusion_model):
        pruned = apply.LDCPApplyDynamicPruning.execute(model, gates, -1.0, sites="ff").args[0]
        kit.sample(kit.graph(pruned))
    record = comfy.patch.attached(pruned).record
    assert record.pruned_evaluations == record.evaluations == 2 and not record.notes


@pytest.mark.parametrize("change", NO_CHANGE)
def test_what_changes_no_call_is_pruned_like_anything(
    comfy, unpruned, pruned, masked, sampled, change
):
    model, gates = pruned()
    with masked(unpruned, gates):
        expected = sampled(unpruned, NO_CHANGE[change])
    assert apart(sampled(model, NO_CHANGE[change]), expected) <= TOLERANCE
    assert not comfy.patch.attached(model).record.notes


def test_what_packs_leave_behind_is_no_change(comfy, unpruned, pruned, masked, sampled, caplog):
    model, gates = pruned()
    with masked(unpruned, gates):
        expected = sampled(unpruned)
    blocks = [
        middle(unpruned.model.diffusion_model),
        *middle(unpruned.model.diffusion_model).modules(),
    ]
    for module in blocks:
        module.forward = module.forward
        if isinstance(module, nn.Conv2d):
            module._conv_forward = module._conv_forward
    left = [vars(module)["forward"] for module in blocks]
    with caplog.at_level(logging.WARNING, "ldcp"):
        found = sampled(model)
    assert apart(found, expected) <= TOLERANCE
    assert not caplog.records and comfy.patch.attached(model).record.pruned_evaluations == 1
    assert all(vars(module)["forward"] is one for module, one in zip(blocks, left, strict=True))
    for module in blocks:
        vars(module).pop("forward", None), vars(module).pop("_conv_forward", None)


def test_a_layer_of_a_class_that_computes_more_runs_as_it_is(comfy, small_model, make_gates, kit):
    model = small_model()
    layer = conv(model.model.diffusion_model)

    class Louder(type(layer)):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Louder
    gates = make_gates(constants=20.0)
    patched = comfy.patch.attach(model, comfy.patch.Layer(gates, gates.keep_sets()))
    kit.sample(kit.graph(patched))
    (note,) = comfy.patch.attached(patched).record.notes
    assert note == (
        "mid_block.resnets.0 runs unpruned, because of a Louder that is not computed as a "
        "convolution"
    )


def test_one_cause_is_told_once_a_run_for_all_blocks(comfy, unpruned, make_gates, sample, caplog):
    topology = comfy.core.Topology((32, 64, 128, 128), context_width=64, heads=(8, 8, 8, 8))
    gates = make_gates([site.name for site in topology.sites("all")])
    model = comfy.patch.attach(unpruned, comfy.patch.Layer(gates, gates.keep_sets()))
    with caplog.at_level(logging.WARNING, "ldcp"), replaced(nn.Conv2d, "forward", louder):
        sample(model, 2)
        sample(model, 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == second and " and 19 more run unpruned, because another node" in first
    assert first.removeprefix("LDCP: ") == comfy.patch.attached(model).record.notes[0]


def cached(model):
    """A cache that answers for the whole model, as DeepCache's node does."""
    model = model.clone()
    unet = model.model.diffusion_model

    def answer(apply_model, call):
        return call["input"] / (1 + call["timestep"][0])

    model.set_model_unet_function_wrapper(answer)
    return model, unet


def test_a_run_in_which_the_model_is_never_asked_says_so(comfy, pruned, sample, caplog):
    from_cache, _ = cached(pruned()[0])
    with caplog.at_level(logging.WARNING, "ldcp"):
        sample(from_cache, 3)
    record = comfy.patch.attached(from_cache).record
    assert record.sampled and record.evaluations == 0
    (message,) = [r.getMessage() for r in caplog.records]
    assert message == "LDCP: " + record.notes[0]
    assert "never asked the model, so nothing was pruned" in message
    report = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPPruningReport"]
    text, _ = report.execute(from_cache).args
    assert "measured  sampled, but the model was never asked: nothing was pruned" in text
    assert "without a sampler" not in text


def test_a_run_that_fails_in_its_first_evaluation_has_asked_the_model(
    comfy, pruned, sample, caplog
):
    model = pruned()[0]

    def fail(*_):
        raise RuntimeError("out of memory")

    handle = model.model.diffusion_model.out[0].register_forward_pre_hook(fail)
    try:
        with pytest.raises(RuntimeError, match="out of memory"):
            sample(model, 2)
    finally:
        handle.remove()
    record = comfy.patch.attached(model).record
    assert not caplog.records and not record.notes
    report = comfy.nodes.NODE_CLASS_MAPPINGS["LDCPPruningReport"]
    text, _ = report.execute(model).args
    assert "measured  no step of 2 ran pruned (0 of 1 evaluations)" in text


def test_a_run_without_steps_is_none_that_a_cache_must_have_answered(
    comfy, pruned, conditioning, caplog
):
    model, samplers = pruned()[0], comfy.root.samplers
    guider = samplers.CFGGuider(model)
    guider.set_conds(conditioning(5), conditioning(6))
    latent, sigmas = torch.zeros(1, 4, 8, 8), torch.tensor([1.0])  # SplitSigmas at step 0
    guider.sample(latent, latent, samplers.sampler_object("euler"), sigmas, disable_pbar=True)
    (message,) = [r.getMessage() for r in caplog.records]
    assert "unless it was interrupted or had no steps, another node" in message


def test_a_model_evaluated_with_the_options_of_another_says_that_it_was_not_pruned(
    comfy, pruned, conditioning, kit, model
):
    """DualModelGuider evaluates its second model with the options of the first."""
    extras = pytest.importorskip("comfy_extras.nodes_custom_sampler")
    if not hasattr(extras, "Guider_DualModel"):
        pytest.skip("this ComfyUI has no DualModelGuider")
    negative = pruned()[0]
    guider = extras.Guider_DualModel(model, negative)
    guider.set_conds(conditioning(5), conditioning(6))
    guider.set_cfg(2.0)
    sampler, sigmas = comfy.root.samplers.sampler_object("euler"), torch.tensor([1.0, 0.5, 0.0])
    latent = torch.ones(1, 4, 8, 8)
    guider.sample(latent, latent, sampler, sigmas, disable_pbar=True)
    record = comfy.patch.attached(negative).record
    assert record.evaluations == 0
    (note,) = record.notes
    assert "another model's options (as DualModelGuider its model_negative)" in note


def test_a_run_that_is_announced_twice_is_one_run(comfy, pruned, sample, caplog):
    """As DualModelGuider announces the same model in both of its places."""
    model = pruned()[0]
    again = model.clone()
    again.pre_run()
    sample(model, 2)
    again.cleanup()
    record = comfy.patch.attached(model).record
    assert not caplog.records and (record.evaluations, record.pruned_evaluations) == (2, 2)


def test_evaluations_that_come_to_no_pruned_block_do_not_count_as_pruned(
    comfy, pruned, kit, unpruned
):
    model = pruned()[0].clone()
    answered = []

    def wrapper(executor, x, *args, **kwargs):
        if answered:
            return answered[0]
        answered.append(executor(x, *args, **kwargs))
        return answered[0]

    kind = comfy.root.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "cache", wrapper)
    kit.sample(kit.graph(model))
    record = comfy.patch.attached(model).record
    assert (record.evaluations, record.pruned_evaluations, record.pruned_steps) == (2, 1, {0})
    (note,) = record.notes
    assert note.startswith("1 of 2 evaluations did not reach the pruned layers")
