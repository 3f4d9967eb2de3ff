"""First weights, the same for every family, so that two students differ by architecture only."""

from torch import nn


def initialise(model: nn.Module) -> None:
    """Set convolutions to He-normal values (fan-out, ReLU gain) and batch norms to the identity; linear layers stay torch's.

    Reference: He et al., Delving Deep into Rectifiers, ICCV 2015, arXiv 1502.01852, section 2.2.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
