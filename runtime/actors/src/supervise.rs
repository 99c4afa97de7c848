//! A worker's panic is caught and counted, and ends its node's incarnation: what it held is only safe to reuse under a new epoch.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context as Poller, Poll};

use actix::prelude::*;

/// Told why this incarnation of a node is over: an actor panicked, or others have declared it lost.
pub type OnEnd = Rc<dyn Fn(&str)>;

/// Runs an actor; when it panics, it is dropped and `on_end` is told.
struct Supervised<A: Actor<Context = Context<A>>> {
    name: &'static str,
    running: Option<actix::dev::ContextFut<A, Context<A>>>,
    on_end: OnEnd,
}

impl<A: Actor<Context = Context<A>>> Unpin for Supervised<A> {}

impl<A: Actor<Context = Context<A>>> Future for Supervised<A> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, poller: &mut Poller<'_>) -> Poll<()> {
        let this = self.get_mut();
        let Some(running) = &mut this.running else { return Poll::Ready(()) };
        match std::panic::catch_unwind(AssertUnwindSafe(|| Pin::new(running).poll(poller))) {
            Ok(poll) => poll,
            Err(_) => {
                tracing::error!(actor = this.name, "an actor panicked; its node's incarnation ends");
                this.running = None;
                (this.on_end)(&format!("its {} panicked", this.name));
                Poll::Ready(())
            }
        }
    }
}

/// Starts an actor under supervision, on the current thread's local set, in a context whose address may be known already.
pub(crate) fn start<A: Actor<Context = Context<A>>>(
    name: &'static str,
    on_end: &OnEnd,
    context: Context<A>,
    actor: A,
) -> Addr<A> {
    let running = context.into_future(actor);
    let address = running.address();
    tokio::task::spawn_local(Supervised { name, running: Some(running), on_end: Rc::clone(on_end) });
    address
}
