"""Networks whose weights are tensors from the start, or whose layers share one: a file for each kind."""

from tenfold.networks.bank_ranks import choose_ranks
from tenfold.networks.conv_block import ARCHITECTURES, ConvBlock
from tenfold.networks.joint_fit import BankProblem, fit_bank_
from tenfold.networks.kernel_bank import KernelBank, SharedConv
from tenfold.networks.train_bank import TrainBank
from tenfold.networks.tucker_bank import TuckerBank

__all__ = [
    "ARCHITECTURES",
    "BankProblem",
    "ConvBlock",
    "KernelBank",
    "SharedConv",
    "TrainBank",
    "TuckerBank",
    "choose_ranks",
    "fit_bank_",
]
