//! The suite that every transport passes.

kvferry_transport::conformance!(kvferry_tcp::TcpProvider::new());
