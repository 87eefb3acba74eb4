from .base import Attachment, BlockAttachment, Joint, Override, Switch, Tap, WeightMergingAttachment
from .branch import ATTENTION, FFN, INPUTS, BranchAttachment
from .linear import LinearAttachment, LowRankAttachment
from .module_branch import ModuleBranchAttachment
from .prompts import PromptAttachment, PromptStream
from .weights import WeightAttachment

__all__ = [
    'ATTENTION',
    'FFN',
    'INPUTS',
    'Attachment',
    'BlockAttachment',
    'BranchAttachment',
    'Joint',
    'LinearAttachment',
    'LowRankAttachment',
    'ModuleBranchAttachment',
    'Override',
    'PromptAttachment',
    'PromptStream',
    'Switch',
    'Tap',
    'WeightAttachment',
    'WeightMergingAttachment',
]
