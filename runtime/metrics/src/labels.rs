//! What tells time series of one name apart. Every value is one of few: nothing that a peer chooses is a label.

use prometheus_client::encoding::EncodeLabelSet;

/// Which part of a handover a time is of.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Stage {
    pub(crate) stage: &'static str,
}

/// How something ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Ending {
    pub(crate) outcome: &'static str,
}

/// What carried bytes, and who asked for them.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Carrier {
    pub(crate) transport: String,
    pub(crate) device: String,
    pub(crate) direction: &'static str,
}

/// Which rail became what.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Turn {
    pub(crate) transport: String,
    pub(crate) device: String,
    pub(crate) health: &'static str,
}

/// Of what credits are out.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct Credited {
    pub(crate) of: &'static str,
}

/// What an actor has in hand.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(crate) struct InHand {
    pub(crate) actor: &'static str,
    pub(crate) what: &'static str,
}
