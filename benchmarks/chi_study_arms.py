"""Every run of the χ study by stage; docs/chi_study.md says what each stage is for."""

from benchmarks.chi_study_run import Setting, Varied

FIXED = {"policy": "fixed"}
LOW = ("fixed 0.25", "fixed 0.5", "fixed 1.0", "atan")
"""Arms that are tried at half the learning rate too. The others did better at twice the rate, or were far behind."""


def chi(target: float, target_end: float | None = None, **settings) -> dict:
    return {"policy": "chi", "target": target, "target_end": target if target_end is None else target_end, **settings}


def _rivals(lr: float, **rest) -> list[Setting]:
    """Every arm without χ control."""
    fixed = [Setting(arm=f"fixed {w}", width=w, policy=FIXED, lr=lr, **rest) for w in (0.25, 0.5, 1.0, 2.0, 4.0)]
    return [
        *fixed,
        Setting(arm="atan", surrogate="atan", width=0.31830988618379067, policy=FIXED, lr=lr, **rest),
        Setting(arm="schedule 2 to 0.5", width=2.0, policy={"policy": "schedule", "width_end": 0.5}, lr=lr, **rest),
        Setting(arm="mpd_agl", surrogate="rectangle", policy={"policy": "mpd_agl"}, lr=lr, **rest),
        Setting(arm="ds_atgo", surrogate="rectangle", policy={"policy": "ds_atgo"}, lr=lr, **rest),
    ]


def _search(lr: float, **rest) -> list[Setting]:
    """Variants of the target's course and slope in depth, the shape, scale and indicator; from random widths."""
    arms = {
        "chi 0.5 to 0.3": {"policy": chi(0.5, 0.3)},
        "chi 0.4": {"policy": chi(0.4)},
        "chi 0.6 to 0.3": {"policy": chi(0.6, 0.3)},
        "chi 0.5 to 0.2": {"policy": chi(0.5, 0.2)},
        "chi 0.6 to 0.4": {"policy": chi(0.6, 0.4)},
        "chi 0.4 to 0.2": {"policy": chi(0.4, 0.2)},
        "chi 0.5 to 0.3, deeper wider": {"policy": chi(0.5, 0.3, target_slope=0.2)},
        "chi 0.5 to 0.3, deeper narrower": {"policy": chi(0.5, 0.3, target_slope=-0.2)},
        "chi 0.5 to 0.3, rectangle": {"surrogate": "rectangle", "policy": chi(0.5, 0.3)},
        "chi 0.5 to 0.3, peak": {"scale": "peak", "policy": chi(0.5, 0.3)},
        "participation 0.5 to 0.4": {"policy": chi(0.5, 0.4, indicator="participation")},
        "chi 0.5 to 0.3, eta 0.2": {"policy": chi(0.5, 0.3, eta=0.2)},
    }
    return [Setting(arm=arm, width=None, lr=lr, **settings, **rest) for arm, settings in arms.items()]


def _confirm() -> list[Setting]:
    """The best courses at the better learning rate, over three seeds."""
    courses = {"chi 0.5 to 0.2": chi(0.5, 0.2), "chi 0.6 to 0.3": chi(0.6, 0.3), "chi 0.6 to 0.2": chi(0.6, 0.2)}
    return [
        Setting(arm=arm, width=None, policy=policy, lr=0.2, seed=seed)
        for seed in (0, 1, 2)
        for arm, policy in courses.items()
    ]


def _floor() -> list[Setting]:
    """A far too narrow rectangle: fixed, steered by coverage, or by an indicator that does not see starving layers."""
    blind = chi(0.5, 0.5, indicator="participation", floor_coverage=0.1)
    policies = {
        "narrow, fixed": FIXED,
        "narrow, coverage held": chi(0.5, 0.2),
        "narrow, participation held, floor 0.1": blind,
        "narrow, participation held, no floor": blind | {"floor_coverage": 0.0, "floor_rate": 0.0},
    }
    common = {"surrogate": "rectangle", "width": 0.02, "lr": 0.2, "epochs": 4}
    return [Setting(arm=arm, policy=policy, **common) for arm, policy in policies.items()]


FROZEN = chi(0.6, 0.2)
"""The setting that the search ended with."""


def _final() -> list[Setting]:
    """The frozen arms on the test split, named "role: name". The baseline and the rival run on every second seed."""
    runs = []
    for seed in range(20):
        common = {"lr": 0.2, "seed": seed, "split": "test"}
        runs.append(Setting(arm="chi: coverage 0.6 to 0.2, any start", width=None, policy=FROZEN, **common))
        runs.append(Setting(arm="best fixed: triangle 1.0", width=1.0, policy=FIXED, **common))
        if seed % 2 == 0:
            atan = {"surrogate": "atan", "width": 0.31830988618379067, "policy": FIXED}
            runs.append(Setting(arm="atan: alpha 2", **atan, **common))
            mpd_agl = {"surrogate": "rectangle", "policy": {"policy": "mpd_agl"}}
            runs.append(Setting(arm="rival: MPD-AGL", **mpd_agl, **common))
    return sorted(runs, key=lambda setting: setting.arm.startswith(("atan", "rival")))


def _transfer() -> list[Setting]:
    """The frozen setting, untouched, at other T, another resolution and three times the depth."""
    elsewhere = {
        "T=2": {"T": 2},
        "T=8": {"T": 8, "epochs": 4},
        "27 layers": {"arch": "sew_cifar26", "epochs": 4, "num_images": 5_000},
    }
    runs = []
    for seed in (0, 1):
        for where, change in elsewhere.items():
            common = {"lr": 0.2, "seed": seed, **change}
            runs.append(Setting(arm=f"chi, {where}", width=None, policy=FROZEN, **common))
            runs.append(Setting(arm=f"fixed 1.0, {where}", width=1.0, policy=FIXED, **common))
            atan = {"surrogate": "atan", "width": 0.31830988618379067, "policy": FIXED}
            runs.append(Setting(arm=f"atan, {where}", **atan, **common))
    return runs


def _deep() -> list[Setting]:
    """χ control of a deep network at T = 2: random starts, courses of the target, slopes in depth, scales."""
    atan = {"surrogate": "atan", "width": 0.31830988618379067, "policy": FIXED}
    arms = {
        "chi 0.6 to 0.2": {"width": None, "policy": FROZEN},
        "fixed 1.0": {"policy": FIXED},
        "chi 0.6 to 0.2, from 1.0": {"policy": FROZEN},
        "atan": atan,
        "chi 0.4, from 1.0": {"policy": chi(0.4)},
        "chi 0.5 to 0.3, from 1.0": {"policy": chi(0.5, 0.3)},
        "chi 0.6 to 0.2, from 1.0, rms": {"scale": "rms", "policy": FROZEN},
        "chi 0.6 to 0.2, from 1.0, peak": {"scale": "peak", "policy": FROZEN},
        "chi 0.4, from 1.0, deeper narrower": {"policy": chi(0.4, target_slope=-0.3)},
        "chi 0.4, from 1.0, deeper wider": {"policy": chi(0.4, target_slope=0.3)},
        "fixed 0.5": {"width": 0.5, "policy": FIXED},
        "fixed 2.0": {"width": 2.0, "policy": FIXED},
    }
    common = {"arch": "sew_cifar26", "T": 2, "epochs": 4, "num_images": 5_000, "lr": 0.2}
    return [Setting(arm=arm, **setting, **common, seed=seed) for seed in (0, 1) for arm, setting in arms.items()]


def quick(target: float, target_end: float | None = None, **settings) -> dict:
    """χ control by the law in log r, with a decision every second step."""
    return chi(target, target_end, interval=2, **settings)


def _search_quick() -> list[Setting]:
    """The small network with the quick control from random starts, over two seeds; one arm jitters its widths."""
    arms = {
        "quick 0.4": {"policy": quick(0.4)},
        "quick 0.6 to 0.2": {"policy": quick(0.6, 0.2)},
        "quick 0.5 to 0.3, deeper narrower": {"policy": quick(0.5, 0.3, target_slope=-0.2)},
        "quick 0.5 to 0.3, two scales": {"policy": quick(0.5, 0.3), "jitter": 0.7},
    }
    return [
        Varied(arm=arm, width=None, lr=0.2, seed=seed, **setting) for seed in (0, 1) for arm, setting in arms.items()
    ]


FROZEN_QUICK = quick(0.5, 0.3, target_slope=-0.2)
"""The setting that the search with the quick control ended with."""


def _deep_quick() -> list[Setting]:
    """The deep network with the quick control, from random widths or calibrated on the first batch."""
    arms = {
        "chi 0.5 to 0.3, calibrated": {"policy": FROZEN_QUICK, "calibrated": True},
        "chi 0.5 to 0.3, any start": {"policy": FROZEN_QUICK},
        "quick 0.4, calibrated": {"policy": quick(0.4), "calibrated": True},
        "quick 0.4, any start": {"policy": quick(0.4)},
    }
    common = {"width": None, "arch": "sew_cifar26", "T": 2, "epochs": 4, "num_images": 5_000, "lr": 0.2}
    return [Varied(arm=arm, **setting, **common, seed=seed) for seed in (0, 1) for arm, setting in arms.items()]


def _final_quick() -> list[Setting]:
    """The second frozen setting in the test of the first one, in fp32. Seed by seed, both arms each."""
    runs = []
    for seed in range(20):
        common = {"lr": 0.2, "seed": seed, "split": "test", "precision": "fp32"}
        arm = "chi: coverage 0.5 to 0.3, less in deep layers, any start"
        runs.append(Varied(arm=arm, width=None, policy=FROZEN_QUICK, **common))
        runs.append(Varied(arm="best fixed: triangle 1.0", width=1.0, policy=FIXED, **common))
    return runs


def _final_32() -> list[Setting]:
    """At the images' own resolution, on the test split, over 4 epochs. Seed by seed, all arms each."""
    runs = []
    for seed in range(4):
        common = {"lr": 0.2, "seed": seed, "split": "test", "image_size": 32, "epochs": 4}
        arm = "chi: coverage 0.5 to 0.3, less in deep layers, any start"
        runs.append(Setting(arm=arm, width=None, policy=FROZEN_QUICK, **common))
        runs.append(Setting(arm="best fixed: triangle 1.0", width=1.0, policy=FIXED, **common))
        atan = {"surrogate": "atan", "width": 0.31830988618379067, "policy": FIXED}
        runs.append(Setting(arm="atan: alpha 2", **atan, **common))
    return runs


CARRIED = ("chi 0.5 to 0.3, lif", "fixed 1.0, lif", "atan, lif", "fixed 0.5, lif")
"""Arms that run over more seeds: the results of the search and the sweep for IF, the baseline, a width for LIF."""


def _other_neuron() -> list[Setting]:
    """LIF with τ = 2, whose potentials spread half as far: the widths swept for IF, and the setting frozen for IF."""
    atan = {"surrogate": "atan", "width": 0.31830988618379067, "policy": FIXED}
    arms = {
        "chi 0.5 to 0.3, lif": {"width": None, "policy": FROZEN_QUICK},
        "fixed 1.0, lif": {"width": 1.0, "policy": FIXED},
        "atan, lif": atan,
        "fixed 0.5, lif": {"width": 0.5, "policy": FIXED},
        "fixed 0.25, lif": {"width": 0.25, "policy": FIXED},
        "fixed 2.0, lif": {"width": 2.0, "policy": FIXED},
    }
    seeds = [(seed, arm) for seed in range(5) for arm in arms if seed == 0 or arm in CARRIED]
    return [Varied(arm=arm, neuron="lif", lr=0.2, seed=seed, **arms[arm]) for seed, arm in seeds]


STAGES: dict[str, list[Setting]] = {
    "sweep": _rivals(0.1),
    "search": _search(0.1),
    "rates": _rivals(0.2) + [setting for setting in _rivals(0.05) if setting.arm in LOW],
    "confirm": _confirm(),
    "floor": _floor(),
    "final": _final(),
    "final_quick": _final_quick(),
    "final_32": _final_32(),
    "deep": _deep(),
    "deep_quick": _deep_quick(),
    "search_quick": _search_quick(),
    "other_neuron": _other_neuron(),
    "transfer": _transfer(),
}
