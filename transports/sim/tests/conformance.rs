//! The suite that every transport has to pass, over fabrics of several kinds.

use std::time::Duration;

use kvferry_fabric_sim::{Delivery, Fabric, FabricOptions, FenceBy, Pacing, SimProvider};

fn fabric(change: impl FnOnce(&mut FabricOptions)) -> SimProvider {
    let pacing = Pacing::Stepped(Duration::from_micros(10));
    let mut options = FabricOptions { bytes_per_second: 10_000_000_000, pacing, ..FabricOptions::default() };
    change(&mut options);
    SimProvider::new(Fabric::new(options))
}

/// As over a reliable connection, one slice at a time.
mod ordered {
    kvferry_transport::conformance!(super::fabric(|options| options.window = 1));
}

/// Many slices on their way, in order though their ways differ.
mod ordered_with_jitter {
    use std::time::Duration;

    kvferry_transport::conformance!(super::fabric(|options| {
        options.window = 8;
        options.jitter = Duration::from_micros(200);
    }));
}

/// Many slices on their way, in any order.
mod unordered {
    use std::time::Duration;

    use super::Delivery;

    kvferry_transport::conformance!(super::fabric(|options| {
        options.window = 16;
        options.delivery = Delivery::Unordered;
        options.jitter = Duration::from_micros(200);
        options.slice_bytes = 8 << 10;
        options.seed = 7;
    }));
}

/// Queues so short that only a few transfers are taken at once.
mod shallow {
    use super::Delivery;

    kvferry_transport::conformance!(super::fabric(|options| {
        options.depth = 200;
        options.delivery = Delivery::Unordered;
        options.slice_bytes = 1;
        options.bytes_per_second = 1_000_000_000_000;
    }));
}

/// Fences by new keys.
mod rekeying {
    use super::FenceBy;

    kvferry_transport::conformance!(super::fabric(|options| options.fence_by = FenceBy::Rekeying));
}
