//! The suite once more with pools that only a device touches, at both ends or at one.

use kvferry_tcp::TcpProvider;
use kvferry_transport::conformance::{OnDevice, destination_pools, every_pool, source_pools};

mod both {
    kvferry_transport::conformance!(super::OnDevice::new(super::TcpProvider::new(), super::every_pool, 64 << 10, 8));
}

mod source {
    kvferry_transport::conformance!(super::OnDevice::new(super::TcpProvider::new(), super::source_pools, 64 << 10, 8));
}

mod destination {
    kvferry_transport::conformance!(super::OnDevice::new(
        super::TcpProvider::new(),
        super::destination_pools,
        64 << 10,
        8
    ));
}

/// One slot for each direction, of a page, and sockets that take hardly more: everything is cut everywhere.
mod tiny {
    kvferry_transport::conformance!(super::OnDevice::new(
        super::TcpProvider::new().with_socket_buffers(2048),
        super::every_pool,
        4096,
        2
    ));
}
