"""Teacher and student: loading, pruning, and the pipeline that is saved at the end."""

import copy

import torch
from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError
from sources import prompts_of

import ld_pruner_hf
from ld_pruner_hf import NoiseProcess, PruningPlan
from ld_pruner_hf.latents import find_denoiser, schedulers_of

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def load_pipeline(name, args, **components):
    """A pipeline in float32, from a folder, the Hub or the package."""
    options = {"dtype": torch.float32, **components}
    if name.startswith("demo:"):
        return ld_pruner_hf.demo.load(name.removeprefix("demo:"), **options)
    if name == args.teacher:
        options |= {"revision": args.revision, "variant": args.variant}
    return DiffusionPipeline.from_pretrained(name, **options)


def noise_process(pipe, args):
    """What the pipeline's scheduler undoes."""
    schedulers = schedulers_of(pipe)
    if len(schedulers) != 1:
        raise ValueError(
            f"--teacher: {type(pipe).__name__} has {len(schedulers)} schedulers, one for each of its stages; expected one"
        )
    return NoiseProcess.of(schedulers[0], args.prediction_type)


def make_student(args, teacher, component, accelerator):
    """The student's denoiser in float32: from a pruned pipeline, or the teacher's pruned here."""
    if args.student:
        pruned = load_pipeline(args.student, args)
        find_denoiser(pruned, component)  # an error that names what is there, if not this
        student = getattr(pruned, component)
        check_pair(getattr(teacher, component), student)
        return student
    pruned = with_component(teacher, component, copy.deepcopy(getattr(teacher, component)))
    if args.plan in ld_pruner_hf.PRESETS:
        ld_pruner_hf.prune(pruned, args.plan, component=component)
        return getattr(pruned, component)
    kept = args.output_dir / "plan.json"
    if args.prune:
        _make_plan(args, teacher, component, kept, accelerator)
    plan = PruningPlan.load(args.plan or kept)
    ld_pruner_hf.prune(pruned, plan, component=component)
    if accelerator.is_main_process:
        plan.save(kept)
    return getattr(pruned, component)


def _make_plan(args, teacher, component, file, accelerator):
    """Write the plan of --prune K once, not once a process; a resumed run keeps the one that it has."""
    if accelerator.is_main_process and not (args.resume_from_checkpoint and file.is_file()):
        scores = args.scores
        if scores is None:
            accelerator.print("no --scores: scoring the operators first")
            rows = args.output_dir / "scores.json"
            scores = ld_pruner_hf.score(teacher, prompts_of(args, teacher), component=component, resume_from=rows)
        ld_pruner_hf.make_plan(teacher, args.prune, scores=scores, component=component).save(file)
    accelerator.wait_for_everyone()


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


def freeze(pipe, dtype):
    """All models of the pipeline in the precision of the run, without gradients."""
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            keeps_float32 = dtype == torch.float16 and getattr(part.config, "force_upcast", False)
            part.eval().requires_grad_(False).to(torch.float32 if keeps_float32 else dtype)


def freeze_unused(student, loss):
    """Freeze the parameters that the loss does not depend on, such as those behind a stand-in of zeros; returns their names.

    DDP would wait for their gradients. The backward pass also shows at start-up whether a batch fits into memory.
    """
    loss.backward()
    unused = [name for name, p in student.named_parameters() if p.grad is None]
    for p in student.parameters():
        p.requires_grad_(p.grad is not None)
        p.grad = None
    return unused


def create_repo(args):
    """Make the repository of --push_to_hub before anything long.

    Raises:
        ValueError: the Hub cannot be reached, or does not let us.
    """
    name = args.hub_model_id or args.output_dir.name
    try:
        return HfApi().create_repo(name, exist_ok=True).repo_id
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ValueError(f"--push_to_hub: cannot make the repository {name} ({error}); `hf auth login`?") from error


def save_pipeline(args, component, student):
    """The whole pipeline with the student in it; the other models as they were, in float32. LoRA layers are merged."""
    if args.train_lora_rank:
        student.save_lora_adapter(args.output_dir / "lora")
        student.fuse_lora()
        student.unload_lora()
    name = getattr(args, "student", None) or args.teacher
    done = load_pipeline(name, args, **{component: student.eval()})
    push = {"push_to_hub": True, "repo_id": args.hub_model_id or args.output_dir.name} if args.push_to_hub else {}
    done.save_pretrained(str(args.output_dir), safe_serialization=True, **push)
    print(f"saved {args.output_dir}")


def save_lora(args, pipe, component, student):
    """The LoRA alone, for `load_lora_weights` of the pipeline; for `load_lora_adapter` of its model where it has no such method."""
    if hasattr(pipe, "save_lora_weights"):
        from peft import get_peft_model_state_dict

        layers = {f"{component}_lora_layers": get_peft_model_state_dict(student)}
        pipe.save_lora_weights(args.output_dir, **layers, **_collate_lora_metadata({component: student}))
    else:
        student.save_lora_adapter(args.output_dir)
    if args.push_to_hub:
        HfApi().upload_folder(repo_id=create_repo(args), folder_path=args.output_dir, allow_patterns="*.safetensors")
    print(f"saved {args.output_dir}")
