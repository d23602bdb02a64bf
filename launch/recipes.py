"""Named configurations. A recipe is a function that returns a whole `Config`; its docstring says what to expect."""

import math
from collections.abc import Callable
from dataclasses import replace

from pipeline.config import ChiConfig, Config, DataConfig, ModelConfig, OptimConfig, TrainConfig
from pipeline.ranks.cores import quick_precision

CONTROL = ChiConfig(target=0.5, target_end=0.3, calibrate=True)
"""What docs/chi_study.md compares with fixed surrogates."""


def digits() -> Config:
    """SEW-ResNet, 6 spiking layers, T=4, on the 1,797 handwritten digits of scikit-learn.

    python -m data_prep digits data/digits
    deepspeed --num_accelerators 2 launch/train.py --recipe digits

    About 40 s on two cores of an AMD EPYC in bf16; 98.1 % of the validation split with each of three seeds. In fp32,
    where the processor has no bf16, about 90 s.
    """
    return Config(
        recipe="digits",
        run_dir="runs/digits",
        data=DataConfig(
            path="data/digits",
            image_size=16,
            global_batch=128,
            micro_batch=16,
            crop_area_min=0.7,
            crop_aspect=1.15,
            flip=False,
        ),
        model=ModelConfig(arch="sew_tiny", T=4),
        chi=CONTROL,
        optim=OptimConfig(lr=0.4),
        train=TrainConfig(precision=quick_precision(), epochs=30, checkpoint_every=50, eval_every_epochs=6),
    )


def digits_dvs() -> Config:
    """SEW-ResNet8, 9 spiking layers of LIF neurons, T=8, on event data: the digits before a simulated event camera.

    python -m data_prep digits_dvs data/digits_dvs
    deepspeed --num_accelerators 2 launch/train.py --recipe digits_dvs

    The sensor's 24 x 24 pixels are summed into 12 x 12 cells, and 0.2 s are cut into frames of 25 ms. Neurons leak:
    what a pixel showed before the digit moved on must fade. Recordings are few: of each up to 30 % of the events are
    dropped while training.
    About 91 % of the 359 recordings of the validation split, 91.1 to 91.4 over three seeds. `make train
    RECIPE=digits_dvs` takes one to three minutes on two cores of an AMD EPYC, packing and report included.
    """
    return Config(
        recipe="digits_dvs",
        run_dir="runs/digits_dvs",
        data=DataConfig(
            path="data/digits_dvs", image_size=12, global_batch=32, micro_batch=16, flip=False, event_drop=0.3
        ),
        model=ModelConfig(arch="sew_cifar8", T=8, neuron="lif"),
        chi=CONTROL,
        optim=OptimConfig(name="adamw", lr=0.004, weight_decay=0.1),
        train=TrainConfig(precision=quick_precision(), epochs=30, checkpoint_every=200, eval_every_epochs=6),
    )


def cifar10() -> Config:
    """SEW-ResNet20, 21 spiking layers, T=4, on CIFAR-10 at 32 x 32.

    python -m data_prep imagefolder cifar10-images.tar.gz data/cifar10
    deepspeed --num_accelerators 2 launch/train.py --recipe cifar10

    For one GPU or more, or two CPU ranks. Not run here beyond its first steps: neither time nor accuracy is known.
    """
    return Config(
        recipe="cifar10",
        run_dir="runs/cifar10",
        data=DataConfig(path="data/cifar10", image_size=32, global_batch=128, micro_batch=32, crop_area_min=0.5),
        model=ModelConfig(arch="sew_cifar20", T=4),
        chi=CONTROL,
        optim=OptimConfig(lr=0.1, weight_decay=5e-4, warmup_epochs=1),
        train=TrainConfig(
            precision=quick_precision(), epochs=100, checkpoint_every=391, eval_every_epochs=1, log_every=20
        ),
    )


def cifar10_strong() -> Config:
    """SEW-ResNet56 on CIFAR-10 with strong augmentation: TrivialAugmentWide, random erasing, mixup and cutmix.

    deepspeed --num_accelerators 2 launch/train.py --recipe cifar10_strong

    Data as in cifar10. The network has three times its parameters and the run is twice as long, since a small network
    underfits what is augmented so; mixup is mild for the same reason. Evaluated is the moving average of the weights.
    Training accuracy is of mixed images, and lower than the evaluation's. A starting point of ours. Not run here beyond
    its first steps: neither time nor accuracy is known.
    """
    base = cifar10()
    return replace(
        base,
        recipe="cifar10_strong",
        run_dir="runs/cifar10_strong",
        data=replace(base.data, aa="ta_wide", reprob=0.25, mixup=0.2, cutmix=1.0),
        model=replace(base.model, arch="sew_cifar56"),
        optim=replace(base.optim, warmup_epochs=5),
        train=replace(base.train, epochs=200, label_smoothing=0.1, ema_decay=0.999),
    )


def imagenet_sew34_baseline() -> Config:
    """SEW-ResNet34 on ImageNet as published, with a fixed surrogate: the baseline for the next two.

    python -m data_prep imagenet --train ILSVRC2012_img_train.tar --val ILSVRC2012_img_val.tar \\
        --devkit ILSVRC2012_devkit_t12.tar.gz data/imagenet
    deepspeed --num_gpus 8 launch/train.py --recipe imagenet_sew34_baseline

    8 GPUs x 32 images, 320 epochs, T=4, fp16; SGD 0.1, momentum 0.9, no weight decay, cosine to 0 by epoch; ADD, IF,
    hard detached reset, ATan of alpha 2 (width 1/pi); random-resized crops and flips, evaluation 256 to 224.
    Not run here. Published: 67.04 % top-1 at its best epoch, 66.66 % at its last; 904 s an epoch on 8 GPUs with the
    original code. Ours differs in that fp16 has fp32 master weights, and that the ranks' running statistics are
    averaged. Other depths: --model.arch sew_resnet18, 50, 101, 152.
    """
    return Config(
        recipe="imagenet_sew34_baseline",
        run_dir="runs/imagenet_sew34_baseline",
        data=DataConfig(path="data/imagenet", image_size=224, global_batch=256, micro_batch=32, eval_resize=256),
        model=ModelConfig(arch="sew_resnet34", T=4, surrogate="atan", width=1 / math.pi),
        chi=ChiConfig(policy="fixed"),
        optim=OptimConfig(lr=0.1, by_epoch=True),
        train=TrainConfig(epochs=320, precision="fp16", checkpoint_every=2500, eval_every_epochs=1, log_every=50),
    )


def imagenet_sew34_chi() -> Config:
    """The baseline with triangular surrogates whose widths hold every layer's coverage, 0.5 falling to 0.3.

    deepspeed --num_gpus 8 launch/train.py --recipe imagenet_sew34_chi

    Data, hardware and all else as in imagenet_sew34_baseline. Not run here. The paper that the idea comes from reports
    69.09 % with a schedule of its own, which is not this one.
    """
    baseline = imagenet_sew34_baseline()
    return replace(
        baseline,
        recipe="imagenet_sew34_chi",
        run_dir="runs/imagenet_sew34_chi",
        model=replace(baseline.model, surrogate="triangle", width=1.0),
        chi=CONTROL,
    )


def imagenet_sew34_tet_chi() -> Config:
    """imagenet_sew34_chi with the TET loss: every time step has to classify by itself.

    deepspeed --num_gpus 8 launch/train.py --recipe imagenet_sew34_tet_chi

    Data, hardware and all else as in imagenet_sew34_baseline. Not run here. Published for TET on this network without
    steered widths: 68.00 %.
    """
    chi = imagenet_sew34_chi()
    return replace(
        chi,
        recipe="imagenet_sew34_tet_chi",
        run_dir="runs/imagenet_sew34_tet_chi",
        train=replace(chi.train, loss="tet", tet_lambda=0.001),
    )


def imagenet_sew34_fast() -> Config:
    """imagenet_sew34_chi in 100 epochs that cost as much as 56 at full size, by known means of faster training.

    deepspeed --num_gpus 8 launch/train.py --recipe imagenet_sew34_fast

    Data and hardware as in imagenet_sew34_baseline. Not run here: each of these is a choice, not a gain measured by us.
    Progressive resolution: 128 pixels until epoch 30, then growing in steps of 32, 224 from epoch 80 on. The cost of an
    image goes by its area, and small images teach early features as well; the last epochs see the evaluation's size.
    FFCV's ResNet recipes and Composer grow their images likewise.
    Warm-up over 5 epochs: the first gradients of a deep spiking network are its least reliable, and a shorter run has
    fewer steps to recover from them. The cosine moves by step, since epochs are few.
    Label smoothing of 0.1, as in timm's and FFCV's recipes: it keeps logits small. SEW-ResNet34 underfits ImageNet, so
    it may cost accuracy here; --train.label_smoothing 0 leaves it out.
    Moving average of the weights over some 10,000 steps, two epochs: while the rate is high it evaluates better than
    the last weights; at the end of a cosine both are about equal.
    Stronger augmentation is left out, for a network that underfits, and is an option of all ImageNet recipes; as timm
    trains its ResNets: --data.aa rand-m7-mstd0.5-inc1 --data.mixup 0.1 --data.cutmix 1.
    """
    chi = imagenet_sew34_chi()
    return replace(
        chi,
        recipe="imagenet_sew34_fast",
        run_dir="runs/imagenet_sew34_fast",
        data=replace(chi.data, image_size_start=128, image_size_ramp=(30.0, 80.0)),
        optim=replace(chi.optim, by_epoch=False, warmup_epochs=5),
        train=replace(chi.train, epochs=100, label_smoothing=0.1, ema_decay=0.9999),
    )


def imagenet_ms34_chi() -> Config:
    """imagenet_sew34_chi with MS-ResNet34, whose shortcuts carry membrane currents, in place of SEW-ResNet34.

    deepspeed --num_gpus 8 launch/train.py --recipe imagenet_ms34_chi

    Data, hardware and all else as in imagenet_sew34_baseline; every block starts as its shortcut, as in the original
    code of MS-ResNet, which trains LIF neurons for T=6. Not run here: neither time nor accuracy is known.
    """
    chi = imagenet_sew34_chi()
    return replace(
        chi,
        recipe="imagenet_ms34_chi",
        run_dir="runs/imagenet_ms34_chi",
        model=replace(chi.model, arch="ms_resnet34", zero_init_residual=True),
    )


def imagenet100() -> Config:
    """SEW-ResNet18 on 100 classes of ImageNet: folders train/SYNSET and val/SYNSET.

    python -m data_prep imagefolder imagenet100 data/imagenet100
    deepspeed --num_gpus 8 launch/train.py --recipe imagenet100

    For 8 GPUs x 32 images, or 1, 2 or 4 with accumulation. A starting point of ours. Not run here: neither time nor
    accuracy is known.
    """
    return Config(
        recipe="imagenet100",
        run_dir="runs/imagenet100",
        data=DataConfig(path="data/imagenet100", image_size=224, global_batch=256, micro_batch=32, eval_resize=256),
        model=ModelConfig(arch="sew_resnet18", T=4),
        chi=CONTROL,
        optim=OptimConfig(lr=0.1, weight_decay=1e-4, warmup_epochs=5),
        train=TrainConfig(epochs=100, checkpoint_every=500, eval_every_epochs=1, log_every=20),
    )


def tiny_imagenet() -> Config:
    """SEW-ResNet18 on Tiny ImageNet, 200 classes at 64 x 64.

    python -m data_prep imagefolder tiny-imagenet-200.zip data/tiny_imagenet
    deepspeed --num_gpus 4 launch/train.py --recipe tiny_imagenet

    The archive as it is distributed, or its folder: val gets its labels from val_annotations.txt, test has none and is
    passed over. For 4 GPUs x 64 images, or 1 or 2 with accumulation. A starting point of ours. Not run here: neither
    time nor accuracy is known.
    """
    return Config(
        recipe="tiny_imagenet",
        run_dir="runs/tiny_imagenet",
        data=DataConfig(path="data/tiny_imagenet", image_size=64, global_batch=256, micro_batch=64, crop_area_min=0.25),
        model=ModelConfig(arch="sew_resnet18", T=4),
        chi=CONTROL,
        optim=OptimConfig(lr=0.1, weight_decay=5e-4, warmup_epochs=5),
        train=TrainConfig(epochs=100, checkpoint_every=391, eval_every_epochs=1, log_every=20),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    recipe.__name__: recipe
    for recipe in (
        digits,
        digits_dvs,
        cifar10,
        cifar10_strong,
        imagenet_sew34_baseline,
        imagenet_sew34_chi,
        imagenet_sew34_tet_chi,
        imagenet_sew34_fast,
        imagenet_ms34_chi,
        imagenet100,
        tiny_imagenet,
    )
}
