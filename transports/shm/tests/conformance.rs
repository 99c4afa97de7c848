//! The suite that every transport has to pass.

kvferry_transport::conformance!(kvferry_shm::ShmProvider);
