"""Networks whose weights are tensors from the start, or whose layers share one: a file for each kind."""

from tenfold.networks.bank_ranks import choose_ranks
from tenfold.networks.binary import BinaryConv2d, BinaryNet, Latent, NetworkLatent, PackedConv2d, pack
from tenfold.networks.conv_block import ARCHITECTURES, ConvBlock
from tenfold.networks.domain_folder import load_domains, save_domains, stored_domains
from tenfold.networks.feature_maps import FEATURE_MAPS, FeatureMap, feature_map
from tenfold.networks.forecaster import Forecaster, taught_steps
from tenfold.networks.generalized_tt import OPERATIONS, GeneralizedTTNetwork
from tenfold.networks.higher_order_rnn import HigherOrderCell, HigherOrderLSTM, HigherOrderRNN
from tenfold.networks.joint_fit import BankProblem, fit_bank_
from tenfold.networks.kernel_bank import KernelBank, SharedConv
from tenfold.networks.learnet import OneShotSiamese, PredictedConv2d, PredictedLinear, WholeConv2d
from tenfold.networks.mps_classifier import MPSClassifier, snake
from tenfold.networks.mps_sweeps import SweepConfig, SweepRecord, train_by_sweeps
from tenfold.networks.multi_domain import DomainConvStack, MultiDomainNet
from tenfold.networks.polynomial_fusion import PolynomialFusion
from tenfold.networks.train_bank import TrainBank
from tenfold.networks.transduction import TemporalFactor, VideoNet, inflated
from tenfold.networks.tucker_bank import TuckerBank

__all__ = [
    "ARCHITECTURES",
    "FEATURE_MAPS",
    "OPERATIONS",
    "BankProblem",
    "BinaryConv2d",
    "BinaryNet",
    "ConvBlock",
    "DomainConvStack",
    "FeatureMap",
    "Forecaster",
    "GeneralizedTTNetwork",
    "HigherOrderCell",
    "HigherOrderLSTM",
    "HigherOrderRNN",
    "KernelBank",
    "Latent",
    "MPSClassifier",
    "MultiDomainNet",
    "NetworkLatent",
    "OneShotSiamese",
    "PackedConv2d",
    "PolynomialFusion",
    "PredictedConv2d",
    "PredictedLinear",
    "SharedConv",
    "SweepConfig",
    "SweepRecord",
    "TemporalFactor",
    "TrainBank",
    "TuckerBank",
    "VideoNet",
    "WholeConv2d",
    "choose_ranks",
    "feature_map",
    "fit_bank_",
    "inflated",
    "load_domains",
    "pack",
    "save_domains",
    "snake",
    "stored_domains",
    "taught_steps",
    "train_by_sweeps",
]
