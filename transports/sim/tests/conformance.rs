//! The suite that every transport has to pass.

use std::time::Duration;

use kvferry_fabric_sim::{Fabric, FabricOptions, Pacing, SimProvider};

fn provider() -> SimProvider {
    let pacing = Pacing::Stepped(Duration::from_micros(10));
    SimProvider::new(Fabric::new(FabricOptions {
        bytes_per_second: 10_000_000_000,
        pacing,
        ..FabricOptions::default()
    }))
}

kvferry_transport::conformance!(provider());
