//! Events in a producer's stream: transfers wait for them, and layers are marked ready by them.

use std::any::Any;
use std::ffi::c_void;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use kvferry_transport::DeviceEvent;

use crate::driver::{self, EventHandle};
use crate::gpu::Gpu;

/// A point in a stream of a serving stack: done when everything that was put into the stream before it is.
pub struct GpuEvent {
    gpu: Arc<Gpu>,
    label: String,
    event: EventHandle,
    /// Who else owns the event; without it, it is ours to destroy.
    keep_alive: Option<Arc<dyn Any + Send + Sync>>,
}

// SAFETY: events may be used from any thread that has made their context current, which every function here does first.
unsafe impl Send for GpuEvent {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for GpuEvent {}

impl GpuEvent {
    /// Records an event now, behind everything that `stream` (a `CUstream` or `cudaStream_t` of GPU `ordinal`; null: its default stream) has
    /// been given so far. An error says why that is not possible.
    ///
    /// # Safety
    /// The stream exists, in the GPU's primary context.
    pub unsafe fn record(ordinal: u32, stream: *mut c_void) -> Result<Arc<GpuEvent>, String> {
        let gpu = Gpu::open(ordinal)?;
        gpu.enter()?;
        let event = driver::create_event(false)?;
        let event = GpuEvent { label: gpu.label(), gpu, event, keep_alive: None };
        // SAFETY: the event was just made; the stream is the caller's promise.
        unsafe { driver::record(event.event, stream.cast())? };
        Ok(Arc::new(event))
    }

    /// An event that the serving stack has recorded (a `CUevent` or `cudaEvent_t` of GPU `ordinal`, PyTorch's `Event.cuda_event`). It must not
    /// be recorded anew before it is done.
    ///
    /// # Safety
    /// The event exists for as long as `keep_alive` lives, in the GPU's primary context.
    pub unsafe fn from_raw(
        ordinal: u32,
        event: *mut c_void,
        keep_alive: Arc<dyn Any + Send + Sync>,
    ) -> Result<Arc<GpuEvent>, String> {
        let gpu = Gpu::open(ordinal)?;
        Ok(Arc::new(GpuEvent { label: gpu.label(), gpu, event: event.cast(), keep_alive: Some(keep_alive) }))
    }

    /// Calls `then` once it is done, on a thread of the driver: hand the news on there and do little else, above all nothing with CUDA. With
    /// `kvferry`'s `EnginePort`, layers become ready when their kernels have ended: `event.on_done(move || port.ready(request, steps))`.
    ///
    /// If the GPU's context fails before, `then` is dropped uncalled, or never heard of again: deadlines end what waits for it.
    pub fn on_done(&self, then: impl FnOnce() + Send + 'static) -> Result<(), String> {
        self.gpu.enter()?;
        let stream = driver::create_stream()?;
        let call: Box<Call> = Box::new(Box::new(then));
        let argument = Box::into_raw(call);
        // SAFETY: the event and the stream exist; `called` takes the argument back, exactly once, unless the launch is refused. Destroying a
        // stream lets what is in it go on.
        unsafe {
            let launched = driver::stream_waits(stream, self.event)
                .and_then(|()| driver::launch_host(stream, called, argument.cast()));
            if launched.is_err() {
                drop(Box::from_raw(argument));
            }
            driver::destroy_stream(stream).and(launched)?;
        }
        Ok(())
    }

    /// Has a stream of GPU `gpu` wait for it.
    ///
    /// # Safety
    /// The stream exists, in the present context.
    pub(crate) unsafe fn hold_back(&self, stream: driver::Stream) -> Result<(), driver::CudaError> {
        // SAFETY: the event exists; the caller's promise. The driver keeps what the wait needs, even if the event is destroyed.
        unsafe { driver::stream_waits(stream, self.event) }
    }
}

type Call = Box<dyn FnOnce() + Send>;

extern "C" fn called(argument: *mut c_void) {
    // SAFETY: `on_done` made it, and the driver calls once.
    let call = unsafe { Box::from_raw(argument.cast::<Call>()) };
    // A panic must not cross into the driver.
    if catch_unwind(AssertUnwindSafe(*call)).is_err() {
        tracing::error!("what was to follow an event panicked");
    }
}

impl DeviceEvent for GpuEvent {
    fn device(&self) -> &str {
        &self.label
    }

    fn is_done(&self) -> Result<bool, String> {
        self.gpu.enter()?;
        // SAFETY: the event exists.
        Ok(unsafe { driver::is_done(self.event) }?)
    }
}

impl Drop for GpuEvent {
    fn drop(&mut self) {
        if self.keep_alive.is_none() && self.gpu.enter().is_ok() {
            // SAFETY: ours, and used no more; what waits for it in a stream still does.
            let _destroyed = unsafe { driver::destroy_event(self.event) };
        }
    }
}

impl fmt::Debug for GpuEvent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuEvent").field("device", &self.label).finish_non_exhaustive()
    }
}
