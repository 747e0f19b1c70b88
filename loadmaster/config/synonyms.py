"""What other tools call our fields and their values, for the hint under a key that does not exist.

Of Axolotl, LLaMA-Factory, transformers, TRL, PEFT and torchtune.
"""

from __future__ import annotations

_THEIRS = {
    "model.name": "base_model model_name_or_path",
    "model.revision": "model_revision",
    "model.chat_template": "chat_template chat_template_jinja chat_template_path",
    "data.path": "dataset dataset_name datasets",
    "data.subset": "dataset_config dataset_config_name",
    "data.columns": "column_map field_instruction field_messages field_output",
    "data.validation": "dataset_val eval_dataset test_split_size val_set_size val_size",
    "data.validation_split": "dataset_test_split",
    "data.packing": "packed sample_packing",
    "data.on_long_row": "excess_length_strategy truncation_mode",
    "data.max_rows": "max_samples",
    "sequence_length": "cutoff_len max_length max_seq_len max_seq_length max_seqlen model_max_length seq_len "
    "sequence_len",
    "objective": "loss_type pref_loss rl stage",
    "preference.beta": "dpo_beta orpo_alpha rl_beta",
    "method": "adapter finetuning_type load_in_4bit quantization_bit use_peft",
    "precision": "bf16 dtype fp16 load_in_8bit torch_dtype",
    "lora.rank": "lora_r r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.targets": "lora_attn_modules lora_target_linear lora_target_modules target_modules",
    "lora.rank_stabilised": "use_rslora",
    "lora.dora": "use_dora",
    "neftune_alpha": "neftune_noise_alpha",
    "optimizer.name": "optim",
    "optimizer.lr": "learning_rate",
    "optimizer.schedule": "lr_scheduler lr_scheduler_type",
    "optimizer.warmup_ratio": "warmup",
    "optimizer.warmup_steps": "num_warmup_steps warmup_steps",
    "optimizer.decay_ratio": "lr_wsd_decay_iters num_decay_steps",
    "optimizer.min_lr_ratio": "cosine_min_lr_ratio min_lr min_lr_factor min_lr_rate",
    "optimizer.beta1": "adam_beta1 beta_1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon",
    "optimizer.max_grad_norm": "clip_grad_norm grad_clip",
    "optimizer.in_backward": "optimizer_in_bwd",
    "batch.global_size": "batch_size gradient_accumulation_steps train_batch_size",
    "micro_batch_size": "device_batch_size per_device_train_batch_size",
    "epochs": "max_epochs num_epochs num_train_epochs",
    "max_steps": "steps",
    "activation_checkpointing": "enable_activation_checkpointing enable_activation_offloading gradient_checkpointing",
    "sharding": "deepspeed fsdp",
    "offload": "fsdp_offload_params offload_params",
    "checkpoint.every_steps": "save_steps save_strategy saves_per_epoch",
    "checkpoint.keep_last": "save_total_limit",
    "checkpoint.load_best": "load_best_model_at_end",
    "evaluation.every_steps": "eval_steps eval_strategy evals_per_epoch run_val_every_n_steps",
    "evaluation.patience": "early_stopping_patience",
    "seed": "random_state",
    "run_dir": "output_dir",
    "hardware.count": "num_gpus",
    "launch.hang_timeout_s": "ddp_timeout",
    "tracker.name": "report_to use_mlflow use_tensorboard use_wandb",
    "tracker.project": "wandb_project",
}
ALIASES = {name: field for field, names in _THEIRS.items() for name in names.split()}

OTHER_QUANTITIES = {
    "batch_size", "chat_template", "ddp_timeout", "enable_activation_offloading", "evals_per_epoch",
    "gradient_accumulation_steps", "lr_wsd_decay_iters", "min_lr", "num_decay_steps", "saves_per_epoch",
}
"""Those of ALIASES whose values mean something else in our field: steps where it takes a share, a name for a file."""

MEANT = {
    "bf16": "bf16",
    "enable_activation_checkpointing": "full",
    "fp16": "bf16",
    "fsdp": "fsdp",
    "fsdp_offload_params": "all",
    "gradient_checkpointing": "full",
    "load_in_4bit": "qlora",
    "load_in_8bit": "fp8",
    "lora_target_linear": "all-linear",
    "offload_params": "all",
    "use_mlflow": "mlflow",
    "use_peft": "lora",
    "use_tensorboard": "tensorboard",
    "use_wandb": "wandb",
}
"""The value of our field that these of ALIASES ask for, where theirs is none of its own, such as true."""

VALUES = {
    "activation_checkpointing": {"true": "full", "false": "none"},
    "data.on_long_row": {"keep_start": "cut", "raise": "refuse", "truncate": "cut"},
    "lora.targets": {"all": "all-linear", "output_proj": "o_proj"},
    "objective": {"pt": "sft", "sigmoid": "dpo"},
    "optimizer.name": {
        "adamw_apex_fused": "adamw",
        "adamw_bnb_8bit": "adamw_8bit",
        "adamw_hf": "adamw",
        "adamw_torch": "adamw",
        "adamw_torch_8bit": "adamw_8bit",
        "adamw_torch_fused": "adamw",
        "paged_adamw": "adamw",
        "paged_adamw_32bit": "adamw",
    },
    "optimizer.schedule": {
        "constant_with_warmup": "constant",
        "cosine_with_min_lr": "cosine",
        "cosine_with_restarts": "cosine",
        "warmup_stable_decay": "wsd",
    },
    "precision": {"bfloat16": "bf16", "float16": "bf16", "fp16": "bf16", "float32": "fp32"},
    "sharding": {"full_shard": "fsdp"},
}
"""What other tools call the values of a field."""

_WITHOUT = {
    "logging_steps logging_strategy log_every_n_steps": "every step is logged, in metrics.jsonl",
    "attn_implementation flash_attention flash_attn sdp_attention xformers_attention": "attention is always a flash or "
    "flex kernel on a GPU (docs/training.md)",
    "use_liger_kernel enable_liger_kernel liger_rope liger_rms_norm liger_glu_activation "
    "liger_fused_linear_cross_entropy": "compiled layers (compile) and the loss have fused kernels of their own",
    "template": "rows are rendered by the chat template of the model's own tokenizer; "
    "model.chat_template=FILE gives it another one",
    "train_on_inputs train_on_input train_on_prompt mask_prompt assistant_only_loss completion_only_loss "
    "roles_to_train": "what the assistant says is trained and nothing else; of data.format=text every token is",
    "special_tokens eos_token pad_token eot_tokens": "special tokens are the tokenizer's, ends of turns its template's",
    "mask_history": "what the assistant says is trained; an earlier answer with weight: 0 is not (docs/data.md)",
    "pad_to_sequence_len eval_sample_packing eval_packing packing_strategy group_by_length": "data.packing says it",
    "mix_strategy interleave_strategy interleave_probs dataset_weights": "a file that stands in the list data.path "
    "twice is trained on twice in each epoch",
    "dataset_num_proc dataset_processes preprocessing_num_workers dataloader_num_workers": "rows are tokenised on all "
    "cores",
    "dataset_prepared_path overwrite_cache tokenized_path": "tokenised rows are cached below LOADMASTER_CACHE",
    "max_prompt_length": "sequence_length holds prompt and answer",
    "per_device_eval_batch_size batch_size_val": "the held-out loss takes micro_batch_size rows at a time",
    "init_lora_weights pissa_init": "an adapter begins as zero, by LoRA's usual B = 0",
    "ref_model precompute_ref_log_probs sync_ref_model": "the reference is the base model: with its adapter switched "
    "off, or asked once before all weights are trained",
    "resume resume_from_checkpoint auto_resume_from_checkpoints overwrite_output_dir": "the same command goes on from "
    "the newest checkpoint; run_dir=NEW begins anew",
    "rpo_alpha pref_ftx": "dpo has no term of likelihood besides; orpo has",
    "metric_for_best_model greater_is_better": "the best checkpoint is the one with the lowest held-out loss",
    "eval_on_start": "the evaluate stage measures before and after training",
    "do_train do_eval do_predict": "stop_after says which stages run",
    "plot_loss": "report.html has the curves",
    "use_reentrant": "activation_checkpointing says it",
    "push_to_hub hub_model_id hub_strategy export_hub_model_id": "`loadmaster push RUN --repo OWNER/NAME` uploads an "
    "export",
    "model_type tokenizer_type": "config.json and tokenizer_config.json of the model say it",
    "trust_remote_code": "code that lies beside a model is never run",
    "lora_model_dir adapter_name_or_path": "training begins with a whole model: merge the adapter into its base and "
    "give that as model.path",
    "run_name wandb_name wandb_entity wandb_watch wandb_log_model": "the tracker's own environment variables, such as "
    "WANDB_NAME, are read",
}
NO_FIELD = {name: f"take it out: {reason}" for names, reason in _WITHOUT.items() for name in names.split()}
"""What other tools have to be told and a job here has not, and why."""

TOKENS, SHARE = {"k": 1024, "m": 1024**2}, {"%": 0.01}
UNITS: dict[str, dict[str, float]] = {
    "_s": {"s": 1, "m": 60, "min": 60, "h": 3600}, "_ms": {"ms": 1, "s": 1000}, "_hours": {"h": 1, "d": 24},
    "_gb": {"g": 1, "gb": 1, "t": 1000, "tb": 1000}, "_length": TOKENS, "_len": TOKENS, "_tokens": TOKENS,
    ".lr": SHARE, ".eps": SHARE, ".weight_decay": SHARE, "": {"k": 1000, "m": 10**6, **SHARE},
}
"""How a field's name ends -> what people write behind its number, and how much that is."""
