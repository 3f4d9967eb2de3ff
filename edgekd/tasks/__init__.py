"""Tasks: what labels mean, and how well a model does."""

from edgekd.tasks.base import Task
from edgekd.tasks.classification import Classification, ClassificationConfig

# a union discriminated by ``kind`` as soon as there is a second member
TaskConfig = ClassificationConfig

__all__ = ["Classification", "ClassificationConfig", "Task", "TaskConfig", "build"]


def build(config: TaskConfig) -> Task:
    """The task that a recipe's ``task`` section describes."""
    return Classification(config.label_smoothing)
