//! The same suite with socket buffers so small that nearly every call is cut short.

kvferry_transport::conformance!(kvferry_tcp::TcpProvider::new().with_socket_buffers(2048));
