"""The one error of this library that is not about an argument's type or value."""


class TeleportError(RuntimeError):
    """A teleport that cannot be done with this model and this batch; the model is as it was."""
