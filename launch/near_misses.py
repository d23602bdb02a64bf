"""For an unknown option, the one that was probably meant: by the names of other trainers, else by spelling."""

import difflib
import re
from collections.abc import Iterable

_ALIASES = """
    data.global_batch, data.micro_batch: b bs batch batch_size batchsize gradient_accumulation_steps grad_accum_steps
        accum_iter accumulation_steps accumulate_grad_batches grad_accum accum gradient_accumulation
    data.global_batch: global_batch_size train_batch_size total_batch_size effective_batch_size
    data.micro_batch: per_device_train_batch_size per_gpu_train_batch_size local_batch_size micro_batch_size mbs
        train_micro_batch_size_per_gpu per_gpu_batch_size batch_size_per_gpu microbatch eval_batch_size
        per_device_eval_batch_size validation_batch_size test_batch_size val_batch_size
    optim.lr: learning_rate base_lr lr_base blr peak_lr max_lr initial_lr init_lr
    optim.weight_decay: wd l2 decay
    optim.name: opt optim optimizer optimizer_name optimizer_type adam adamw sgd
    optim.schedule: sched scheduler lr_scheduler lr_scheduler_type lr_schedule schedule_type decay_type lr_decay
    optim.warmup_epochs: warmup warmup_steps warmup_ratio lr_warmup_epochs num_warmup_steps warmup_iters lr_warmup
    optim.milestones: decay_epochs decay_milestones lr_milestones lr_steps lr_step_size step_size lr_decay_epochs
    optim.gamma: decay_rate lr_gamma gamma_step lr_decay_rate
    optim.clip: clip_grad max_grad_norm clip_grad_norm grad_clip gradient_clip_val gradient_clipping max_norm
        grad_norm_clip clip_norm
    optim.beta1, optim.beta2: betas opt_betas adam_betas
    optim.beta1: adam_beta1 b1
    optim.beta2: adam_beta2 b2
    optim.eps: opt_eps adam_epsilon epsilon
    optim.decay_norm_and_neurons: norm_weight_decay bias_weight_decay
    train.epochs: e n_epochs num_epochs num_train_epochs max_epochs nb_epochs total_epochs steps max_steps
        training_steps total_steps iters iterations max_iters num_iters train_iters num_train_steps duration
    train.precision: amp fp16 bf16 fp32 half dtype amp_dtype mixed_precision mixed_precision_param autocast
        param_dtype native_amp apex_amp
    train.seed: random_seed manual_seed rng_seed
    train.zero_stage: zero stage zero_optimization zero1 zero2 zero3 fsdp
    train.loss: criterion loss_fn loss_function tet loss_type
    train.tet_lambda: lamb lambda tet_lamb loss_lambda loss_lambd
    train.label_smoothing: smoothing
    train.ema_decay: ema model_ema
    train.log_every: log_interval logging_steps log_freq print_freq log_every_n_steps log_steps print_interval
        display_interval metrics.log_freq
    train.checkpoint_every: save_interval save_steps save_every save_freq checkpoint_interval checkpoint.interval
        recovery_interval checkpoint_freq save_strategy
    train.keep_checkpoints: save_total_limit checkpoint_hist keep_last keep_latest_k checkpoint.keep_latest_k
    train.eval_every_epochs: eval_interval eval_steps eval_every eval_freq val_interval eval_strategy
        evaluation_strategy check_val_every_n_epoch validation.freq val_every
    train.sync_bn: sync_batchnorm sync_batch_norm dist_bn syncbn
    train.profile_steps: profile profiler profiling enable_profiling
    train.timeout_s: timeout ddp_timeout dist_timeout nccl_timeout
    train.on_nonfinite: skip_nan skip_nonfinite nan_policy
    model.arch: a model network net backbone model_name model_name_or_path architecture model.name model.flavor
        model_type
    model.T: time_step time_steps timestep timesteps num_timesteps simulation_time sim_time t_steps
    model.T, train.epochs: num_steps nb_steps
    model.v_th: v_threshold vth threshold thresh v_thr thr
    model.tau: tau_m tau_mem init_tau membrane_tau time_constant
    model.tau, model.neuron: beta leak
    model.neuron: node neuron_type spiking_neuron neuron_model spike_neuron lif plif
    model.connect: cnf connect_f connect_function connection
    model.reset: v_reset hard_reset soft_reset reset_mechanism reset_mode
    model.detach_reset: detach
    model.surrogate: surrogate_function surrogate_grad spike_grad act_fun sg surrogate_gradient
    model.width: alpha sg_width surrogate_width surrogate_alpha sharpness
    model.zero_init_residual: zero_init zero_gamma
    model.checkpoint: gradient_checkpointing grad_checkpointing activation_checkpointing activation_checkpoint
        recompute
    data.path: data data_path data_dir dataset dataset_name dataset_path dataset_dir datadir data_root root train_dir
        train_data train_file imagenet val_dir
    data.image_size: img_size input_size crop_size train_crop_size resolution imgsz size
    data.eval_resize: val_resize_size val_resize crop_pct eval_crop_size
    data.threads: j workers num_workers n_workers dataloader_num_workers nw cpus_per_task
    data.prefetch: prefetch_factor prefetch_batches queue_size dataloader_prefetch_factor
    data.flip: hflip horizontal_flip random_flip fliplr
    data.crop_area_min: rrc_scale crop_scale scale_min
    data.crop_aspect: ratio aspect_ratio crop_ratio
    data.aa: auto_augment autoaugment randaugment rand_augment randaug trivial_augment trivialaugment policy
    data.color_jitter: jitter colour_jitter colorjitter
    data.reprob: random_erase random_erasing erasing erase_prob random_erase_prob cutout
        remode recount resplit
    data.mixup: mixup_alpha use_mixup mixup_mode mixup_off_epoch
    data.cutmix: cutmix_alpha use_cutmix cutmix_minmax
    data.mixup_switch_prob: switch_prob cutmix_prob
    data.window_shards: shuffle shuffle_buffer shuffle_size
    data.cache_dir: cache
    metrics.port: prometheus_port
    metrics.host: bind_address
    metrics.tensorboard: tb log_tensorboard use_tensorboard tensorboard_dir enable_tensorboard
    metrics.tensorboard, metrics.wandb, metrics.mlflow: report_to logger loggers tracker
    metrics.wandb: log_wandb use_wandb wandb_project enable_wandb
    run_dir: output output_dir out out_dir o save_dir save_path savedir checkpoint_dir ckpt_dir log_dir logdir
        logging_dir work_dir workdir experiment exp exp_name exp_dir run_name name folder checkpoint.folder dump_folder
        job.dump_folder result_dir results_dir model_dir
    resume: r resume_from resume_from_checkpoint resume_path resume_checkpoint auto_resume continue continue_training
        load_checkpoint load restore ckpt ckpt_path checkpoint_path
    resume, model.checkpoint: checkpoint
    init_from: pretrained pretrained_path finetune fine_tune finetune_from load_from init_checkpoint initial_checkpoint
        weights pretrain start_from load_weights transfer
    deepspeed_config: deepspeed deepspeed.config ds_config deepspeed_json
    config: cfg config_file config_path conf c yaml job.config_file hparams
    recipe: preset train_config experiment_config task
    dry-run: dry dryrun estimate summary
"""
"""Options, and the names that others use for them: those of timm, torchvision, Hugging Face, torchtitan, Lightning,
SpikingJelly, snnTorch and the original SEW-ResNet code, without dashes and in lower case."""
_COMMON = {"name", "path", "scale", "target"}
"""Parts of many names, which do not show what was meant."""
_ELSEWHERE = {
    "the launcher takes it, in front of launch/train.py: deepspeed --num_gpus 4 launch/train.py …": (
        "gpu gpus num_gpus n_gpu ngpu devices device device_ids cuda gpu_ids nproc_per_node nproc world_size nnodes "
        "num_nodes nodes node_rank num_accelerators include exclude hostfile master_addr master_port dist_url "
        "dist_backend local_rank rank backend distributed ddp no_cuda accelerator strategy num_processes"
    ),
    "the data say the number of classes": "num_classes nb_classes n_classes classes num_labels",
    "a run is evaluated by python -m launch.evaluate RUN": "eval evaluate test test_only do_eval eval_only validate",
    "every run trains; leave it out": "train do_train training",
}


def _alias_table() -> dict[str, tuple[str, ...]]:
    table = {}
    for fields, words in re.findall(r"^    (\S[^:]*): ((?:.+\n)(?:        .+\n)*)", _ALIASES, re.MULTILINE):
        table |= dict.fromkeys(words.split(), tuple(fields.split(", ")))
    return table


ALIASES: dict[str, tuple[str, ...]] = _alias_table()
"""The options that are probably meant, by a name that other trainers use."""


def nearest(option: str, known: Iterable[str]) -> tuple[str, ...]:
    """The options of `known` (names without dashes in front) that `option` may stand for; the likeliest first."""
    word = _normal(option)
    leaf = word.rpartition(".")[2]
    by_name = {_normal(name): name for name in known if name != "help"}
    leaves: dict[str, list[str]] = {}
    for normal, name in by_name.items():
        leaves.setdefault(normal.rpartition(".")[2], []).append(name)
    for guess in (word, leaf, leaf.removeprefix("no_"), leaf.removeprefix("use_")):
        if guess in by_name:
            return (by_name[guess],)
        if guess in ALIASES:
            return ALIASES[guess]
        if guess in leaves:
            return tuple(leaves[guess])
    close = difflib.get_close_matches(word, by_name, n=1, cutoff=0.8)
    if close:
        return (by_name[close[0]],)
    inside = [
        other
        for other in (*leaves, *ALIASES)
        if len(other) > 3 and other not in _COMMON and f"_{other}_" in f"_{leaf}_"
    ]
    close = [max(inside, key=len)] if inside else difflib.get_close_matches(leaf, (*leaves, *ALIASES), n=1, cutoff=0.75)
    return tuple(leaves.get(close[0]) or ALIASES[close[0]]) if close else ()


def answer(option: str, known: Iterable[str]) -> str:
    """What to use instead of `option`, which does not exist; empty where nothing is like it."""
    leaf = _normal(option).rpartition(".")[2]
    for said, words in _ELSEWHERE.items():
        if leaf in words.split():
            return said
    return " or ".join(f"--{name}" for name in nearest(option, known))


def _normal(option: str) -> str:
    return option.strip("-").replace("-", "_").lower()
