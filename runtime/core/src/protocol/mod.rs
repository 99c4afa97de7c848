//! The protocol of a handover, as state machines without IO.
//!
//! Each machine takes inputs (`handle_*(now, …)`), and offers what must be done ([`Command`]) and what happened ([`Event`]) in its
//! [`Outbox`], plus one point in time at which it wants to be called again (`poll_timeout`). [`PrefillRank`] and [`DecodeRank`] run at
//! every rank, [`PrefillLeader`] and [`DecodeLeader`] beside rank 0 of a group, [`Scheduler`] and [`Directory`] once, and a
//! [`Session`] under every link.

mod attendance;
mod bounds;
mod command;
mod conversation;
mod course;
mod credit;
mod deadline;
mod decode;
mod decode_leader;
mod directory;
mod fetch;
mod flight;
mod identity;
mod lease;
mod member_list;
mod message;
mod outcome;
mod path;
mod peer;
mod policy;
mod prefill;
mod prefill_leader;
mod quarantine;
mod rails;
mod rdma;
mod roll;
mod scheduler;
mod scheduler_group;
mod session;
mod shares;
mod sources;
mod standing;
mod subject;
#[cfg(test)]
mod tests;
mod vitals;

pub(crate) use bounds::capped;
pub(crate) use message::Domains;

pub use attendance::{Attendance, Away};
pub use command::{Command, EngineCall, EngineEvent, Event, Finished, NicCommand, NicEvent, Outbox};
pub use conversation::{Conversation, Heard, RESUMING_PROTOCOL, Unheard};
pub use course::{Begun, FetchCourse, OfferCourse, Part, RequestCourse};
pub use credit::{Credit, CreditError};
pub use deadline::{Deadline, DeadlineTerms, Pace};
pub use decode::DecodeRank;
pub use decode_leader::DecodeLeader;
pub use directory::{Directory, JoinError, are_peers, dials};
pub use identity::{Identity, Protocols};
pub use lease::{Lease, LeaseTerms};
pub use member_list::MemberList;
pub use message::{
    FetchJob, Lost, Member, Message, NicAdvert, OfferSummary, OpenFetch, OpenedFetch, OutcomeReport, Pairing,
    PathReport, Place, PrefillJob, Profile, RequestSpec, StandingHandovers, StandingOffer, WorkerProfile,
};
pub use outcome::{Awaited, FailReason, Outcome, PrefillView, Refusal, Role};
pub use path::{ChosenPath, Obstacle, PassedOver, PeerName, RailTurn, ShownPath};
pub use policy::{GroupView, LeastLoaded, LongestHeldPrefix, Policy};
pub use prefill::PrefillRank;
pub use prefill_leader::PrefillLeader;
pub use quarantine::QuarantineTerms;
pub use rails::{RailHealth, RailTerms, Rails, SharedOut};
pub use rdma::RdmaShortfall;
pub use scheduler::{Scheduler, SchedulerTerms, Submitted};
pub use session::{Session, SessionError, SessionEvent, SessionTerms};
pub use shares::{PushShare, PushShares, ShareName};
pub use subject::Subject;
pub use vitals::Vitals;
