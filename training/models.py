"""Teacher and student: loading, pruning, and the pipeline that is saved at the end."""

import copy

import torch
from diffusers import DiffusionPipeline
from sources import prompts_of

import ld_pruner_hf
from ld_pruner_hf import PruningPlan
from ld_pruner_hf.latents import find_denoiser

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def load_pipeline(name, args, **components):
    """A pipeline in float32, from a folder, the Hub or the package."""
    options = {"torch_dtype": torch.float32, **components}
    if name.startswith("demo:"):
        return ld_pruner_hf.demo.load(name.removeprefix("demo:"), **options)
    if name == args.teacher:
        options |= {"revision": args.revision, "variant": args.variant}
    return DiffusionPipeline.from_pretrained(name, **options)


def make_student(args, teacher, component, accelerator):
    """The student's denoiser in float32: from a pruned pipeline, or the teacher's pruned here."""
    if args.student:
        pruned = load_pipeline(args.student, args)
        find_denoiser(pruned, component)  # an error that names what is there, if not this
        student = getattr(pruned, component)
        check_pair(getattr(teacher, component), student)
        return student
    kept = args.output_dir / "plan.json"
    if args.plan:
        plan = PruningPlan.load(args.plan)
    else:
        resumed = args.resume_from_checkpoint and kept.is_file()
        if accelerator.is_main_process and not resumed:  # scored once, not once a process
            scores = args.scores
            if scores is None:
                accelerator.print("no --scores: scoring the operators first")
                scores = ld_pruner_hf.score(
                    teacher,
                    prompts_of(args, teacher),
                    component=component,
                    resume_from=args.output_dir / "scores.json",
                )
            ld_pruner_hf.make_plan(teacher, args.prune, scores=scores, component=component).save(kept)
        accelerator.wait_for_everyone()
        plan = PruningPlan.load(kept)
    pruned = with_component(teacher, component, copy.deepcopy(getattr(teacher, component)))
    ld_pruner_hf.prune(pruned, plan, component=component)
    if accelerator.is_main_process:
        plan.save(kept)
    return getattr(pruned, component)


def check_pair(teacher, student):
    """Raise ValueError if the student cannot be called as the teacher is."""
    if type(teacher) is not type(student):
        raise ValueError(
            f"--student: is a {type(student).__name__}, the teacher a {type(teacher).__name__}; expected a pruned teacher"
        )
    for name in ("in_channels", "out_channels", "cross_attention_dim", "addition_embed_type", "patch_size"):
        ours, theirs = student.config.get(name), teacher.config.get(name)
        if ours != theirs:
            raise ValueError(
                f"--student: its {type(student).__name__} has {name} {ours}, the teacher's {theirs}; expected equal ones"
            )


def with_component(pipe, component, model):
    """The pipeline with another model in it; the rest is shared."""
    other = copy.copy(pipe)
    setattr(other, component, model)
    return other


def add_lora(student, rank):
    """Freeze the student and add trainable LoRA layers to its attentions.

    Raises:
        ValueError: the student has no attention left to add them to.
    """
    from peft import LoraConfig

    layers = [n for n, m in student.named_modules() if n.endswith(LORA_TARGETS) and isinstance(m, torch.nn.Linear)]
    if not layers:  # a stand-in may be in the place of each
        raise ValueError(
            f"--train_lora_rank: {type(student).__name__} has no layers named {LORA_TARGETS}; train all weights"
        )
    student.requires_grad_(False)
    student.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=layers))


def save_pipeline(args, component, student):
    """The whole pipeline with the student in it; the other models as they were, in float32. LoRA layers are merged."""
    if args.train_lora_rank:
        student.save_lora_adapter(args.output_dir / "lora")
        student.fuse_lora()
        student.unload_lora()
    done = load_pipeline(args.student or args.teacher, args, **{component: student.eval()})
    push = {"push_to_hub": True, "repo_id": args.hub_model_id or args.output_dir.name} if args.push_to_hub else {}
    done.save_pretrained(str(args.output_dir), safe_serialization=True, **push)
    print(f"saved {args.output_dir}")
