//! The suite that every transport has to pass, between "hosts" of one NVLink domain, without a GPU: frames by TCP, memory by fabric handle.
#![allow(clippy::unwrap_used, clippy::panic, reason = "this is test code")]

mod support;

use kvferry_cuda::Allocate;
use support::{Hosts, is_ready};

kvferry_transport::conformance!(if is_ready() => Hosts(Allocate::Best));
