"""Networks whose weights are tensors from the start: trained as they are, or regressed on tensors directly."""

from tenfold.networks.binary import BinaryConv2d, BinaryNet, Latent, NetworkLatent, PackedConv2d, pack
from tenfold.networks.domain_folder import load_domains, save_domains, stored_domains
from tenfold.networks.feature_maps import FEATURE_MAPS, FeatureMap, feature_map
from tenfold.networks.forecaster import Forecaster, taught_steps
from tenfold.networks.generalized_tt import OPERATIONS, GeneralizedTTNetwork
from tenfold.networks.higher_order_rnn import HigherOrderCell, HigherOrderLSTM, HigherOrderRNN
from tenfold.networks.learnet import OneShotSiamese, PredictedConv2d, PredictedLinear, WholeConv2d
from tenfold.networks.mps_classifier import MPSClassifier, snake
from tenfold.networks.mps_sweeps import SweepConfig, SweepRecord, train_by_sweeps
from tenfold.networks.multi_domain import DomainConvStack, MultiDomainNet
from tenfold.networks.polynomial_fusion import PolynomialFusion

__all__ = [
    "FEATURE_MAPS",
    "OPERATIONS",
    "BinaryConv2d",
    "BinaryNet",
    "DomainConvStack",
    "FeatureMap",
    "Forecaster",
    "GeneralizedTTNetwork",
    "HigherOrderCell",
    "HigherOrderLSTM",
    "HigherOrderRNN",
    "Latent",
    "MPSClassifier",
    "MultiDomainNet",
    "NetworkLatent",
    "OneShotSiamese",
    "PackedConv2d",
    "PolynomialFusion",
    "PredictedConv2d",
    "PredictedLinear",
    "SweepConfig",
    "SweepRecord",
    "WholeConv2d",
    "feature_map",
    "load_domains",
    "pack",
    "save_domains",
    "snake",
    "stored_domains",
    "taught_steps",
    "train_by_sweeps",
]
