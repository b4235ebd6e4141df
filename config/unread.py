"""Options that are set and that nothing reads: told at a run's start, and not refused, as a base file may have them."""

from config.options import Config
from models.qwen35_moe.config import ModelConfig
from parallelisms.degrees import Degrees


def unread(config: Config, shape: ModelConfig, degrees: Degrees) -> str:
    """One line that names them, each with the option that turns it off; nothing if there are none.

    What only says how often or how something is done, and that by default is, as `checkpoint.interval`, is left out:
    whoever turns it off knows.
    """
    of_chats = "layout messages_key system_key tools_key template_options chat_template train_on train_empty_thinking"
    of_images = "min_pixels max_pixels max_video_pixels video_fps max_video_frames"
    table = [
        (not config.validation.enable, "validation", "path share sets interval steps", "validation.enable is false"),
        (config.mtp.train == "off", "mtp", "loss_weight", "mtp.train is 'off'"),
        (config.lora.rank == 0, "lora", "alpha targets", "lora.rank is 0"),
        (config.data.format == "text", "data", f"{of_chats} too_long", "data.format is 'text'"),
        (config.data.format == "chat", "data", "text_key end_of_document", "data.format is 'chat'"),
        (shape.vision is None, "data", of_images, "the model has no tower"),
        (config.moe.aux_loss_coef == 0, "moe", "aux_loss_scope", "moe.aux_loss_coef is 0"),
        (config.lr_scheduler.decay == "constant", "lr_scheduler", "min_lr_ratio", "lr_scheduler.decay is 'constant'"),
        (degrees.expert == 1, "parallelism", "expert_room", "the expert-parallel degree is 1"),
        (not config.checkpoint.enable, "checkpoint", "export_hf", "checkpoint.enable is false"),
        (not config.metrics.wandb, "metrics", "wandb_project", "metrics.wandb is false"),
    ]
    found = []
    for is_off, section, keys, reason in table:
        options = getattr(config, section)
        default = type(options)()
        values = {key: getattr(options, key) for key in keys.split()}
        names = [f"{section}.{key}" for key, value in values.items() if value != getattr(default, key)]
        if is_off and names:
            found.append(f"{', '.join(names)} ({reason})")
    return f"set, but not read: {'; '.join(found)}" if found else ""
