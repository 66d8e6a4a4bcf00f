"""One short rule per ATen operator: what it says about the channels of its arguments.

A rule is called after its operator ran, with the facts, the operator, its arguments and its result. Operators that are
absent lock what they touch (`without_rule`): nothing is ever guessed. A new rule is a function with the decorator in
the file of its kind.
"""

from yolo_prune.channels.rules import attention, convolution, elementwise, movement, spatial
from yolo_prune.channels.rules.registry import RULES, without_rule

__all__ = ["RULES", "attention", "convolution", "elementwise", "movement", "spatial", "without_rule"]
