//! The suite once more with pools that only a device touches, at both ends or at one.

use kvferry_core::PoolId;
use kvferry_tcp::TcpProvider;
use kvferry_transport::conformance::OnDevice;

fn all(_: PoolId) -> bool {
    true
}

// The suite's sources have odd numbers, its destinations even ones.
fn odd(pool: PoolId) -> bool {
    !pool.0.is_multiple_of(2)
}

fn even(pool: PoolId) -> bool {
    pool.0.is_multiple_of(2)
}

mod both {
    kvferry_transport::conformance!(super::OnDevice::new(super::TcpProvider::new(), super::all, 64 << 10, 8));
}

mod source {
    kvferry_transport::conformance!(super::OnDevice::new(super::TcpProvider::new(), super::odd, 64 << 10, 8));
}

mod destination {
    kvferry_transport::conformance!(super::OnDevice::new(super::TcpProvider::new(), super::even, 64 << 10, 8));
}

/// One slot for each direction, of a page, and sockets that take hardly more: everything is cut everywhere.
mod tiny {
    kvferry_transport::conformance!(super::OnDevice::new(
        super::TcpProvider::new().with_socket_buffers(2048),
        super::all,
        4096,
        2
    ));
}
