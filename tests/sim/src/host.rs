//! Where the NIC actors of simulated nodes run: on the node itself; the kernel pumps them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use actix::prelude::*;
use kvferry_actors::{Host, Nic, NicActor, NicOpened, NicReport, NicStartError, OpenNic};
use kvferry_core::Moment;
use kvferry_fabric_sim::{Fabric, NicId};
use kvferry_transport::{Pool, Transport};
use tokio::sync::{Notify, oneshot};

use crate::chronicle::Chronicle;
use crate::plant::Plant;
use crate::timeline::{Life, Timeline};
use crate::watched_nic::WatchedNic;

/// A NIC, whose it is, and which of its node's.
struct Opened {
    life: Life,
    index: usize,
    nic: Rc<RefCell<Nic>>,
}

/// All NICs of a world.
#[derive(Clone, Default)]
pub(crate) struct Nics {
    inner: Rc<RefCell<BTreeMap<NicId, Opened>>>,
}

impl Nics {
    pub(crate) fn find(&self, nic: NicId) -> Option<(Life, Rc<RefCell<Nic>>)> {
        self.inner.borrow().get(&nic).map(|opened| (opened.life, Rc::clone(&opened.nic)))
    }

    /// A node's NICs, by index.
    pub(crate) fn of(&self, node: usize) -> Vec<(usize, NicId)> {
        let inner = self.inner.borrow();
        inner.iter().filter(|(_, opened)| opened.life.node == node).map(|(id, opened)| (opened.index, *id)).collect()
    }

    /// When NICs are to be pumped even if nothing happens to them.
    pub(crate) fn dues(&self) -> Vec<(NicId, Life, Moment)> {
        let inner = self.inner.borrow();
        inner.iter().filter_map(|(id, opened)| Some((*id, opened.life, opened.nic.borrow().due()?))).collect()
    }

    /// Lets a node's NICs go; they end once their actors do.
    pub(crate) fn remove(&self, life: Life) {
        self.inner.borrow_mut().retain(|_, opened| opened.life != life);
    }
}

pub(crate) struct SimHost {
    pub(crate) fabric: Fabric,
    pub(crate) nics: Nics,
    pub(crate) life: Life,
    pub(crate) timeline: Timeline,
    pub(crate) chronicle: Chronicle,
    pub(crate) plant: Option<Plant>,
}

impl Host for SimHost {
    fn start_nic(
        &self,
        nic: usize,
        open: OpenNic,
        pool: Pool,
        opened: oneshot::Sender<Result<NicOpened, NicStartError>>,
        reports: Recipient<NicReport>,
    ) {
        let index = nic;
        let watched = |transport| {
            let (timeline, chronicle) = (self.timeline.clone(), self.chronicle.clone());
            Box::new(WatchedNic::new(transport, self.life, timeline, chronicle, self.plant)) as Box<dyn Transport>
        };
        let opened_nic = open().map(watched).map_err(NicStartError::from);
        let timeline = self.timeline.clone();
        let clock = Rc::new(move || Moment(timeline.now()));
        let started = opened_nic.and_then(|transport| Nic::new(index, transport, &pool, reports, clock));
        let answer = started.map(|(nic, advert)| {
            let nic = Rc::new(RefCell::new(nic));
            if let Some(id) = self.fabric.nic_at(&advert.address) {
                self.nics.inner.borrow_mut().insert(id, Opened { life: self.life, index, nic: Rc::clone(&nic) });
            }
            // The kernel pumps whatever the fabric says is ready: nobody waits to be woken.
            let port = NicActor::new(nic, Rc::new(Notify::new())).start().recipient();
            NicOpened { advert, port }
        });
        // A node that crashes meanwhile takes no answer.
        let _ = opened.send(answer);
    }
}
