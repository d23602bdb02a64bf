"""Every metric that a run shows, by its name without `snn_` and `_total`. Standard library only.

Each series carries `run`, the name of the run's folder; the table has the further labels. Metrics that every rank shows
have the label `rank`; those without it come from rank 0 alone. A metric whose source a run lacks (a loss scale without
fp16, say) is absent.
"""

from typing import NamedTuple


class Metric(NamedTuple):
    kind: str
    """gauge or counter. A counter counts from the start of its process."""
    text: str
    labels: tuple[str, ...] = ()
    """Besides `run`."""


LAYER, RANK = ("layer",), ("rank",)
METRICS = {
    "build_info": Metric("gauge", "1; what the run is made of", ("version", "python", "torch", "deepspeed")),
    "run_info": Metric("gauge", "1; what runs", ("recipe", "data", "world_size")),
    "run_finished": Metric("gauge", "1 once the run has ended as planned"),
    "run_stopped": Metric("gauge", "1 once the run has stopped on request with its checkpoint saved"),
    "run_restarts": Metric("counter", "Times that the node's supervisor started the ranks again", ("node",)),
    "train_steps": Metric("counter", "Optimizer steps done"),
    "train_samples": Metric("counter", "Samples trained"),
    "train_steps_planned": Metric("gauge", "Optimizer steps of the whole run"),
    "train_step": Metric("gauge", "The last logged optimizer step, counted from the start of the run"),
    "train_loss": Metric("gauge", "Training loss of the last logged step"),
    "train_accuracy_ratio": Metric(
        "gauge",
        "Training accuracy over all samples since the last logged step; mixed images count for their larger part",
    ),
    "train_grad_norm": Metric("gauge", "L2 norm of the gradients of all spiking layers' weights"),
    "train_learning_rate": Metric("gauge", "Learning rate"),
    "train_loss_scale": Metric("gauge", "Loss scale of fp16"),
    "train_images_per_second": Metric("gauge", "Images trained per second since the last logged step, over all ranks"),
    "train_image_size_pixels": Metric("gauge", "Side of the images of the last logged step, where they grow"),
    "train_overflow_steps": Metric(
        "counter", "Optimizer steps that an overflow of the fp16 gradient made no update of"
    ),
    "train_nonfinite_steps": Metric(
        "counter", "Steps whose loss or gradient was not finite, so that they made no update"
    ),
    "train_step_duration_seconds": Metric(
        "gauge", "Mean time of a step since the last logged one, without checkpoints and evaluations", RANK
    ),
    "train_phase_seconds": Metric(
        "counter", "Time spent in data_wait, compute, checkpoint and evaluation", ("rank", "phase")
    ),
    "train_last_step_timestamp_seconds": Metric("gauge", "Unix time of the last logged step", RANK),
    "network_chi": Metric("gauge", "Proportion of all trainable parameters with a non-zero gradient"),
    "layer_chi": Metric("gauge", "Proportion of the layer's weights with a non-zero gradient", LAYER),
    "layer_participation_ratio": Metric(
        "gauge", "Effective proportion of the layer's weights that receive gradient", LAYER
    ),
    "layer_coverage_ratio": Metric("gauge", "Fraction of neuron-steps within the surrogate's support", LAYER),
    "layer_coverage_target_ratio": Metric("gauge", "Coverage that the controller holds", LAYER),
    "layer_surrogate_width": Metric("gauge", "Half-width of the surrogate gradient, in units of the potential", LAYER),
    "layer_firing_rate_ratio": Metric("gauge", "Fraction of neuron-steps that spike", LAYER),
    "layer_gradient_norm": Metric("gauge", "L2 norm of the gradient of the layer's weights", LAYER),
    "eval_loss": Metric("gauge", "Loss of the last evaluation"),
    "eval_accuracy_ratio": Metric("gauge", "Top-1 accuracy of the last evaluation"),
    "data_samples_bad": Metric("counter", "Samples that could not be used and were replaced", ("rank", "reason")),
    "data_bytes_read": Metric("counter", "Bytes of samples read from local shards", RANK),
    "data_queue_depth": Metric("gauge", "Decoded micro-batches that wait for their step", RANK),
    "checkpoint_saves": Metric("counter", "Checkpoints, by result: success or error", ("result",)),
    "checkpoint_duration_seconds": Metric("gauge", "Time that the last checkpoint took"),
    "checkpoint_last_success_timestamp_seconds": Metric("gauge", "Unix time of the last checkpoint"),
}
