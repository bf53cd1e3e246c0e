"""The TRL and transformers methods the trainers override or rely on; an upgrade that changes one fails here."""

import inspect
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import Trainer, TrainerCallback
from transformers.distributed.tensor_parallel import EpDispatchExpertsParallel, apply_expert_parallelism
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from trl import GRPOTrainer, SFTTrainer

from rl.trainer import VerifiedGRPOTrainer
from sft.trainer import PackedSFTTrainer

SIGNATURES = {
    SFTTrainer.compute_loss: "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    GRPOTrainer.compute_loss: "(self, model, inputs, return_outputs=False, num_items_in_batch=None)",
    GRPOTrainer._generate_single_turn:
        "(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False)",
    GRPOTrainer._calculate_rewards: "(self, inputs, prompts, completions, completion_ids_list)",
    GRPOTrainer._generate_and_score_completions: "(self, inputs)",
    GRPOTrainer._prepare_inputs: "(self, generation_batch)",
    GRPOTrainer._get_per_token_logps_and_entropies:
        "(self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, compute_entropy=False, "
        "compute_aux_loss=False, pixel_values=None, image_grid_thw=None, num_images=None, "
        "pixel_attention_mask=None, spatial_shapes=None, num_tiles=None, image_sizes=None, token_type_ids=None, "
        "mm_token_type_ids=None, image_position_ids=None)",
    GRPOTrainer._tokenize_prompts: "(self, prompts)",
    GRPOTrainer.training_step: "(self, model, inputs, num_items_in_batch)",
    DeepseekV3TopkRouter.forward: "(self, hidden_states)",
    Trainer._save: "(self, output_dir=None, state_dict=None)",
    Trainer._clip_grad_norm: "(self, model)",
    Trainer._load_from_checkpoint: "(self, resume_from_checkpoint, model=None)",
    Trainer._save_optimizer_and_scheduler: "(self, output_dir)",
    Trainer._load_optimizer_and_scheduler: "(self, checkpoint)",
    Trainer._get_train_sampler: "(self, train_dataset=None)",
    EpDispatchExpertsParallel._dispatch_tokens:
        "(self, hidden_states, top_k_index, num_local_experts, ep_group, ep_size)",
    EpDispatchExpertsParallel._combine_tokens:
        "(self, expert_output, top_k_weights, order, send_sizes, recv_sizes, ep_group)",
    TrainerCallback.on_save: "(self, args, state, control, **kwargs)",
    TrainerCallback.on_optimizer_step: "(self, args, state, control, **kwargs)",
    TrainerCallback.on_pre_optimizer_step: "(self, args, state, control, **kwargs)",
    TrainerCallback.on_step_end: "(self, args, state, control, **kwargs)",
}


@pytest.mark.parametrize("method", SIGNATURES, ids=lambda method: method.__qualname__)
def test_the_signature_is_the_one_the_overrides_were_written_for(method):
    signature = inspect.signature(method)
    plain = signature.replace(return_annotation=inspect.Signature.empty, parameters=[
        parameter.replace(annotation=inspect.Parameter.empty) for parameter in signature.parameters.values()])
    assert str(plain) == SIGNATURES[method]


@pytest.mark.parametrize("ours", [PackedSFTTrainer, VerifiedGRPOTrainer])
def test_overrides_take_the_parameters_of_what_they_override(ours):
    overridden = [name for cls in ours.__mro__[:2] for name in vars(cls)
                  if not name.startswith("__") and hasattr(ours.__mro__[2], name)
                  and callable(getattr(ours, name))]
    assert {"compute_loss", "_save", "_load_from_checkpoint", "_clip_grad_norm"} <= set(overridden)
    for name in overridden:
        mine, theirs = (list(inspect.signature(getattr(cls, name)).parameters) for cls in (ours, ours.__mro__[2]))
        if mine[-1] == "options":  # the rest is passed on by name
            mine.pop()
            theirs = theirs[:len(mine)]
        assert mine == theirs, name


@pytest.mark.parametrize("line", [
    "self.use_vllm = args.use_vllm", "self._buffered_inputs = None", "self._step = 0", "self.ref_model = ",
    "self.vllm_importance_sampling_correction = args.vllm_importance_sampling_correction"])
def test_the_grpo_trainer_still_keeps_the_attributes_ours_reads_and_sets(line):
    assert line in inspect.getsource(GRPOTrainer.__init__)


@pytest.mark.parametrize(("method", "line"), [
    # engine log-probs are taken for what they are where use_vllm is set, and nowhere else
    (GRPOTrainer._generate_and_score_completions, "if self.use_vllm and self.vllm_importance_sampling_correction:"),
    (GRPOTrainer._generate_and_score_completions, "self._calculate_rewards(inputs, prompts, completions, "),
    # the policy's own pass, which records or replays routes, is the one over self.model
    (GRPOTrainer._generate_and_score_completions,
     "old_per_token_logps, _, _ = self._get_per_token_logps_and_entropies(\n                    self.model,"),
    # rows without a reward leave the baseline
    (GRPOTrainer._generate_and_score_completions, "unscorable_mask = torch.isnan(rewards_per_func).all(dim=1)"),
    (GRPOTrainer._generate, "self._generate_single_turn("),
    (GRPOTrainer._prepare_inputs, "self._buffered_inputs[self._step % self.args.steps_per_generation]"),
    (GRPOTrainer.training_step, "self._step += 1"),
    # the mean over the slot's rows, divided by the slots: what compute_loss scales by the rows of a slot
    (GRPOTrainer._compute_loss, "mask.sum(-1).clamp(min=1.0)).mean()"),
    (GRPOTrainer._compute_loss, "normalizer = self.current_gradient_accumulation_steps"),
    # the sum over tokens divided by those of the whole step: what the MTP loss imitates
    (SFTTrainer.compute_loss, "loss = per_token_loss.sum() / torch.as_tensor(num_tokens).clamp(min=1)"),
    # the norm the curve shows is the one that was clipped
    (Trainer._run_epoch, "grad_norm = self._clip_grad_norm(model)"),
    (Trainer._save_checkpoint, "self.save_model(output_dir, _internal_call=True)"),
    # a policy that says it is sharded is not wrapped again, and all processes take part in saving it
    (Trainer._prepare_for_training, "if self.is_distributed_loading_by_transformers:"),
    (Trainer.save_model, "elif self.is_distributed_loading_by_transformers and not _is_peft_model(self.model):"),
    # TRL's loss is multiplied by the processes over which gradients are averaged: what the other losses imitate
    (SFTTrainer.compute_loss, "loss = loss * (self.accelerator.num_processes // self.get_tp_size())"),
    # the FP8 style is installed with the mesh of experts alone, and its senders are called as the exact ones are
    (apply_expert_parallelism, "style.install_forward(module, ep_mesh)"),
    (EpDispatchExpertsParallel.install_forward, "expert_output, top_k_weights, order, send_sizes, recv_sizes, ep_"),
])
def test_the_library_still_does_what_an_override_relies_on(method, line):
    assert line in inspect.getsource(method)


@pytest.mark.parametrize(("file", "line"), [
    ("outputs.py", "routed_experts: np.ndarray | None = None  # [seq_len,layer_num,topk]"),
    ("engine/arg_utils.py", "enable_return_routed_experts: bool = False"),
    # all layers of the main model, by their own number
    ("model_executor/layers/fused_moe/routed_experts_capturer.py", "num_layers = model_config.get_total_num_hidden"),
    ("model_executor/layers/fused_moe/runner/moe_runner.py", "return extract_layer_index(self.layer_name)"),
    # every token but the last
    ("distributed/aux_output_connector/connector.py", "token_end = request.num_tokens - 1"),
])
def test_vllm_still_lays_routes_out_as_the_trainer_reads_them(file, line):
    """Read as text: the code runs on GPUs alone, and importing vLLM takes longer than all tests here."""
    assert line in (Path(find_spec("vllm").origin).parent / file).read_text()
