"""What `chi.attach` cannot measure right is refused in one line with the cure, or said once."""

import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional

from pipeline import chi
from pipeline.chi.attach import checks
from pipeline.errors import ConfigError
from tests.chi.attach_nets import Net

MILD = {"target_end": 0.5, "interval": 1}


def pair(**settings) -> tuple[Net, torch.optim.Optimizer, chi.Pilot]:
    torch.manual_seed(0)
    net = Net("ours")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    return net, optimizer, chi.attach(net, optimizer, **{**MILD, **settings})


def backward(net: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(8, 32, generator=generator), torch.randint(5, (8,), generator=generator)
    functional.cross_entropy(net(x), y).backward()


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        backward(net, step)
        optimizer.step()


def test_attached_twice_the_second_pilot_goes_on_from_the_first_s_widths():
    net, optimizer, old = pair()
    train(net, optimizer, 3)
    before = old.neurons.widths.clone()
    with pytest.warns(UserWarning, match=r"had a pilot already; it is replaced.*starts from its widths"):
        new = chi.attach(net, optimizer, **MILD)
    assert torch.equal(new.neurons.widths, before)
    train(net, optimizer, 2)
    assert (old.step, new.step) == (3, 2)
    once, once_optimizer, steady = pair()
    train(once, once_optimizer, 3)
    train(once, once_optimizer, 2)
    assert torch.equal(new.neurons.widths, steady.neurons.widths), "two pilots would steer twice"


@pytest.mark.parametrize("shares", ["model", "optimizer"])
def test_a_pilot_of_the_same_model_or_optimizer_is_replaced(shares):
    net, optimizer, old = pair()
    other = Net("ours")
    if shares == "model":
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    else:
        optimizer.add_param_group({"params": other.parameters()})
    with pytest.warns(UserWarning, match="had a pilot already"):
        chi.attach(net if shares == "model" else other, optimizer, **MILD)
    assert old.neurons.neurons[0].tally is not old.neurons.tallies[0]


def test_a_detached_pilot_leaves_the_script_as_it_was():
    net, optimizer, pilot = pair()
    train(net, optimizer, 2)
    widths = pilot.neurons.widths.tolist()
    pilot.detach()
    assert "zero_grad" not in optimizer.__dict__
    train(net, optimizer, 2)
    assert pilot.step == 2
    assert [neuron.width for neuron in pilot.neurons.neurons] == widths
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert chi.attach(net, optimizer, **MILD).neurons.widths.tolist() == widths


class Wrapper(nn.Module):
    """A wrapper of another library, known by its name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("DataParallel", "loses their counts; use DistributedDataParallel"),
        ("FullyShardedDataParallel", "FSDP1 keeps gradients in flat pieces; use fully_shard"),
        ("DeepSpeedEngine", "use launch/train.py"),
    ],
)
def test_wrappers_whose_gradients_cannot_be_measured_are_refused(kind, said):
    net = Net("ours")
    wrapped = nn.DataParallel(net) if kind == "DataParallel" else type(kind, (Wrapper,), {})(net)
    with pytest.raises(ConfigError, match=rf"{kind} is not allowed: .*{said}"):
        chi.attach(wrapped, torch.optim.SGD(net.parameters(), lr=0.1), **MILD)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"calibrate": True}, r"calibrate is no setting here; call pilot.calibrate\(images\)"),
        ({"self_check": False}, "self_check is no setting here"),
        ({"tarjet": 0.4}, "tarjet is no setting; use some of policy, indicator, target"),
        ({"steps": 0}, "steps=0 is not allowed; use the number of optimizer steps"),
        ({"steps": True}, "steps=True is not allowed"),
        ({"steps": 2.5}, r"steps=2.5 is not allowed"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        pair(**settings)


def test_arguments_of_other_kinds_are_refused():
    net = Net("ours")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"model is of type SGD; use a torch.nn.Module"):
        chi.attach(optimizer, net, **MILD)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"optimizer is of type StepLR; use a torch.optim.Optimizer"):
        chi.attach(net, torch.optim.lr_scheduler.StepLR(optimizer, 1), **MILD)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=r"holds none of the model's parameters; make it from model.parameters"):
        chi.attach(net, torch.optim.SGD(Net("ours").parameters(), lr=0.1), **MILD)


@pytest.mark.parametrize("make", [torch.optim.SGD, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)])
def test_another_optimizer_that_makes_the_steps_is_noticed(make):
    net, _, pilot = pair()
    other = make(net.parameters(), lr=0.1)
    with pytest.raises(RuntimeError, match=r"has made 3 steps on these parameters, and the one that was attached none"):
        train(net, other, 10)
    assert pilot.indicators is None


def test_accumulating_and_loading_weights_are_not_taken_for_another_optimizer():
    net, optimizer, pilot = pair()
    for seed in range(10):
        backward(net, seed)
    optimizer.step()
    for _ in range(2):
        net.load_state_dict(net.state_dict())
        backward(net)
    optimizer.step()
    assert pilot.step == 2


def test_training_in_eval_mode_is_refused():
    net, optimizer, _ = pair()
    net.eval()
    backward(net)
    with pytest.raises(ConfigError, match=r"all spiking layers are in eval mode.*call model.train\(\)"):
        optimizer.step()


def test_a_layer_without_a_gradient_is_said_once_and_left_alone():
    net, optimizer, pilot = pair()
    net.a.requires_grad_(False)
    net.norm.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no reading of coverage for first: .*their widths stay as they are") as told:
        train(net, optimizer, 4)
    assert len([one for one in told if "no reading" in str(one.message)]) == 1
    assert pilot.neurons.widths[0] == torch.tensor(0.7)
    assert pilot.neurons.widths[1] != torch.tensor(0.7)
    for module in (net.a, net.norm):
        module.requires_grad_(True)
    train(net, optimizer, 2)  # unfrozen: it is steered from now on
    assert pilot.neurons.widths[0] != torch.tensor(0.7)


def test_a_layer_that_is_skipped_in_some_steps_is_steered_by_the_others():
    net, optimizer, pilot = pair(interval=4)
    for step in range(4):
        optimizer.zero_grad()
        net.train()
        net.second.train(step % 2 == 0)  # as a layer that stochastic depth leaves out: no count in that step
        backward(net, step)
        optimizer.step()
    assert (pilot.neurons.widths != 0.7).all()


def test_a_model_that_was_moved_or_changed_is_refused():
    net, optimizer, _ = pair()
    net.to("meta")
    with pytest.raises(ConfigError, match=r"the model was moved: its widths are on cpu.*chi.attach"):
        net(torch.randn(4, 32, device="meta"))
    net, optimizer, _ = pair()
    train(net, optimizer, 1)
    net.b = nn.utils.parametrizations.weight_norm(net.b)  # pyright: ignore
    backward(net)
    with pytest.raises(ConfigError, match=r"b.weight is gone from the model since chi.attach; attach again"):
        optimizer.step()


def test_a_model_that_was_cast_is_measured_as_it_is():
    net, optimizer, pilot = pair(policy="fixed")
    net.double()
    x = torch.randn(8, 32, dtype=torch.float64)
    net(x).square().sum().backward()
    gradient = net.b.weight.grad
    assert gradient is not None
    norm = gradient.norm().item()
    optimizer.step()
    assert pilot.indicators is not None
    assert pilot.indicators.grad_norm[1].item() == pytest.approx(norm, rel=1e-12)


def test_modules_of_others_may_have_names_that_ours_have():
    net = Net("ours")
    net.a.rule, net.b.tally = "local", 3  # pyright: ignore
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pilot = chi.attach(net, optimizer, **MILD)
    train(net, optimizer, 1)
    assert pilot.step == 1
    assert chi.prepare(net) == {}


def test_a_policy_that_would_see_the_reset_s_second_call_is_refused():
    net = Net("snntorch")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"ds_atgo averages over every call.*first \(snnTorch\).*use another policy"):
        chi.attach(net, optimizer, policy="ds_atgo")


def test_a_step_before_the_first_backward_pass_is_no_step():
    net, optimizer, pilot = pair()
    optimizer.step()  # as people do before a scheduler's first step
    assert (pilot.step, pilot.indicators) == (0, None)
    train(net, optimizer, 1)
    assert pilot.step == 1


def test_a_pilot_s_state_is_loaded_with_weights_only():
    net, optimizer, pilot = pair()
    train(net, optimizer, 2)
    file = io.BytesIO()
    torch.save({"model": net.state_dict(), "pilot": pilot.state_dict()}, file)
    file.seek(0)
    other_net, _, other = pair()
    state = torch.load(file)  # weights only, by default
    other_net.load_state_dict(state["model"])
    other.load_state_dict(state["pilot"])
    assert other.step == 2
    assert torch.equal(other.neurons.widths, pilot.neurons.widths)


def test_a_sharded_model_has_to_be_sharded_as_a_whole(monkeypatch):
    net = Net("ours")
    sharded = type("FSDPNet", (type("FSDPModule", (), {}), Net), {})("ours")
    monkeypatch.setattr(nn.Parameter, "placements", (), raising=False)
    with pytest.raises(ConfigError, match=r"a.weight is a DTensor in a model that fully_shard has not wrapped"):
        checks.unwrap(net)
    assert checks.unwrap(sharded).sharded


def test_a_network_learns_which_weights_feed_a_layer_by_a_functional_convolution():
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.spike, self.filters, self.head = (
                chi.Surrogate(),
                nn.Parameter(torch.randn(6, 3, 3, 3)),
                nn.Linear(6, 2),
            )

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.head(self.spike(functional.conv2d(images, self.filters) - 1).mean((2, 3)))

    model = Functional()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pilot = chi.attach(model, optimizer, **MILD)
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    optimizer.step()
    assert pilot.layers[0].parameters == ("filters",)
    assert pilot.indicators is not None
    assert pilot.indicators.chi.item() > 0


def test_a_state_of_other_layers_is_refused_and_changes_nothing():
    net, optimizer, pilot = pair()
    train(net, optimizer, 2)
    whole, before = pilot.state_dict(), pilot.neurons.widths.clone()
    fewer = {**whole, "layers": whole["layers"][:1]}
    renamed = {**whole, "layers": ["other", *whole["layers"][1:]]}
    widths = {name: value[..., :1] if torch.is_tensor(value) else value for name, value in whole["widths"].items()}
    unnamed = {"widths": widths, "step": 2}
    for state, said in (
        (fewer, f"none where the model has {whole['layers'][1]}"),
        (renamed, f"other where the model has {whole['layers'][0]}"),
        (unnamed, "1 layers where the model has"),
    ):
        with pytest.raises(ConfigError, match=said):
            pilot.load_state_dict(state)
    assert (pilot.step, pilot.neurons.widths.tolist()) == (2, before.tolist())
    del whole["layers"]  # as states were saved before they had names
    pilot.load_state_dict(whole)


@pytest.mark.parametrize("kind", ["attribute", "method"])
def test_what_a_model_of_others_calls_spiking_layers_is_not_taken_for_ours(kind):
    class Listing(Net):
        if kind == "method":

            def spiking_layers(self):
                return [module for module in self.modules() if isinstance(module, chi.Surrogate)]

    net = Listing("hand-written")
    if kind == "attribute":
        net.spiking_layers = nn.ModuleList([nn.ReLU()])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pilot = chi.attach(net, optimizer, **MILD)
    train(net, optimizer, 1)
    assert pilot.step == 1
    assert len(pilot.layers) == 2


def test_ddp_s_join_is_refused(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(Net("ours"))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        chi.attach(model, optimizer, **MILD)
        with model.join():
            backward(model)
            with pytest.raises(ConfigError, match=r"join\(\) lets ranks stop before others"):
                optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("error:chi.attach. no reading")
def test_a_step_that_a_fused_optimizer_leaves_out_measures_nothing():
    torch.manual_seed(0)
    net = Net("ours")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, fused=True)
    pilot, scaler = chi.attach(net, optimizer, **MILD), torch.amp.GradScaler("cpu")
    for factor in (float("inf"), 1.0):
        optimizer.zero_grad()
        before = pilot.neurons.widths.clone()
        scaler.scale(factor * net(torch.randn(8, 32)).square().sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert pilot.indicators is not None
        for values in (pilot.indicators.chi, pilot.indicators.coverage, pilot.indicators.firing_rate):
            assert values.isfinite().tolist() == [factor == 1.0] * 2
        assert torch.equal(pilot.neurons.widths, before) == (factor != 1.0)


def test_after_a_step_that_ended_in_an_error_other_optimizers_are_watched_again():
    net, optimizer, _ = pair()
    other = torch.optim.SGD(net.parameters(), lr=0.1)

    def fails() -> float:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        optimizer.step(fails)
    optimizer.zero_grad()
    backward(net)
    for _ in range(2):
        other.step()
    with pytest.raises(RuntimeError, match="attach to the optimizer that makes the steps"):
        other.step()
