//! Where the NIC actors of simulated nodes run: on the node itself; the kernel pumps them.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use actix::prelude::*;
use kvferry_actors::{Host, Nic, NicActor, NicOpened, NicReport, NicStartError, OpenNic};
use kvferry_fabric_sim::{Fabric, NicId};
use kvferry_transport::Pool;
use tokio::sync::{Notify, oneshot};

use crate::timeline::Life;

/// A NIC, and whose it is.
type Opened = (Life, Rc<RefCell<Nic>>);

/// All NICs of a world.
#[derive(Clone, Default)]
pub(crate) struct Nics {
    inner: Rc<RefCell<BTreeMap<NicId, Opened>>>,
}

impl Nics {
    pub(crate) fn find(&self, nic: NicId) -> Option<Opened> {
        self.inner.borrow().get(&nic).map(|(life, nic)| (*life, Rc::clone(nic)))
    }

    /// A node's NICs, in the order of opening.
    pub(crate) fn of(&self, life: Life) -> Vec<NicId> {
        self.inner.borrow().iter().filter(|(_, (of, _))| *of == life).map(|(nic, _)| *nic).collect()
    }

    /// Lets a node's NICs go, and says which those were; they end once their actors do.
    pub(crate) fn remove(&self, life: Life) -> Vec<NicId> {
        self.inner.borrow_mut().extract_if(.., |_, (of, _)| *of == life).map(|(nic, _)| nic).collect()
    }
}

pub(crate) struct SimHost {
    pub(crate) fabric: Fabric,
    pub(crate) nics: Nics,
    pub(crate) life: Life,
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
        let started =
            open().map_err(NicStartError::from).and_then(|transport| Nic::new(nic, transport, &pool, reports));
        let answer = started.map(|(nic, advert)| {
            let nic = Rc::new(RefCell::new(nic));
            if let Some(id) = self.fabric.nic_at(&advert.address) {
                self.nics.inner.borrow_mut().insert(id, (self.life, Rc::clone(&nic)));
            }
            // The kernel pumps whatever the fabric says is ready: nobody waits to be woken.
            let port = NicActor::new(nic, Rc::new(Notify::new())).start().recipient();
            NicOpened { advert, port }
        });
        // A node that crashes meanwhile takes no answer.
        let _ = opened.send(answer);
    }
}
