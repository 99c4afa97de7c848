//! One binding with whatever library is here: `KVFERRY_LIBFABRIC_LIBRARY`, else the loader's.

use std::ffi::{CStr, CString};
use std::ptr;

use libfabric_sys::{FI_CONTEXT, FI_CONTEXT2, FI_CQ_FORMAT_MSG, FI_WAIT_NONE, calls};
use libfabric_sys::{
    FI_EP_RDM, FI_MR_ALLOCATED, FI_MR_LOCAL, FI_MR_PROV_KEY, FI_MR_VIRT_ADDR, FI_MSG, FI_RMA, Fabric, Padded,
    asked_version, fi_cq_attr, fi_eq_attr, fid_cq, fid_domain, fid_eq, fid_fabric, version,
};

/// The library, unless there is none and nothing requires one.
fn library() -> Option<Fabric> {
    let name = std::env::var("KVFERRY_LIBFABRIC_LIBRARY").ok().filter(|name| !name.is_empty());
    // SAFETY: loading runs the library's initialisers; it is whoever named it that answers for it.
    match unsafe { Fabric::new(name.unwrap_or_else(|| "libfabric.so.1".to_owned())) } {
        Ok(fabric) => Some(fabric),
        Err(error) => {
            let required = std::env::var("KVFERRY_REQUIRE").unwrap_or_default();
            assert!(!required.split(',').any(|word| word == "libfabric"), "required, and not there: {error}");
            println!("skipped: {error}");
            None
        }
    }
}

#[test]
fn a_file_that_is_no_libfabric_lacks_its_functions() {
    // SAFETY: the C library, which is loaded already.
    let fabric = unsafe { Fabric::new("libc.so.6") }.expect("it can be loaded");
    assert!(fabric.fi_getinfo.is_err() && fabric.fi_version.is_err());
    // SAFETY: nothing of that name is loaded.
    assert!(unsafe { Fabric::new("/nowhere/libfabric.so.1") }.is_err());
}

#[test]
fn versions_are_asked_for_as_both_sides_know_them() {
    assert_eq!(asked_version(version(1, 17)), version(1, 17));
    assert_eq!(asked_version(version(2, 6)), version(2, 6));
    assert_eq!(asked_version(version(2, 40)), version(2, 6));
    assert_eq!(asked_version(version(3, 0)), version(2, 6));
}

/// Every provider's information is read, and an object of each kind is opened through it: the structures' fields and the tables' functions
/// are where the bindings say.
#[test]
fn providers_are_found_and_opened() {
    let Some(fabric) = library() else { return };
    let getinfo = fabric.fi_getinfo.as_ref().expect("fi_getinfo");
    let (dupinfo, freeinfo) = (fabric.fi_dupinfo.as_ref().expect("dup"), fabric.fi_freeinfo.as_ref().expect("free"));
    let open = fabric.fi_fabric.as_ref().expect("fi_fabric");
    // SAFETY: it takes nothing.
    let loaded = unsafe { fabric.fi_version.as_ref().expect("fi_version")() };
    assert!(loaded >= version(1, 17), "{loaded:#x}");
    for provider in ["tcp;ofi_rxm", "tcp", "shm", "sockets"] {
        let name = CString::new(provider).expect("a name");
        let mut found = ptr::null_mut();
        // SAFETY: the hints are the library's own, with a string of malloc's; what it answers is read as it says and freed by it.
        unsafe {
            let hints = dupinfo(ptr::null());
            (*hints).caps = u64::from(FI_MSG | FI_RMA);
            (*hints).mode = FI_CONTEXT | FI_CONTEXT2;
            (*(*hints).ep_attr).type_ = FI_EP_RDM;
            (*(*hints).domain_attr).mr_mode =
                (FI_MR_LOCAL | FI_MR_VIRT_ADDR | FI_MR_ALLOCATED | FI_MR_PROV_KEY).cast_signed();
            (*(*hints).fabric_attr).prov_name = libc::strdup(name.as_ptr());
            let status = getinfo(asked_version(loaded), ptr::null(), ptr::null(), 0, hints, &mut found);
            freeinfo(hints);
            assert_eq!(status, 0, "{provider}");
            let named = CStr::from_ptr((*(*found).fabric_attr).prov_name).to_string_lossy().into_owned();
            assert!(named.contains(provider), "{named} for {provider}");
            assert!((*(*found).tx_attr).size > 0 && (*(*found).ep_attr).max_msg_size > 4096, "{provider}");
            assert!(!CStr::from_ptr((*(*found).domain_attr).name).is_empty(), "{provider}");

            let mut object: *mut fid_fabric = ptr::null_mut();
            assert_eq!(open((*found).fabric_attr, &mut object, ptr::null_mut()), 0, "{provider}");
            let mut domain: *mut fid_domain = ptr::null_mut();
            assert_eq!(calls::fi_domain(object, found, &mut domain), 0, "{provider}");
            let mut attr = Padded::<fi_cq_attr>::zeroed();
            attr.fields().format = FI_CQ_FORMAT_MSG;
            attr.fields().wait_obj = FI_WAIT_NONE;
            let mut queue: *mut fid_cq = ptr::null_mut();
            assert_eq!(calls::fi_cq_open(domain, &mut attr, &mut queue), 0, "{provider}");
            let mut events: *mut fid_eq = ptr::null_mut();
            let mut attr = Padded::<fi_eq_attr>::zeroed();
            attr.fields().wait_obj = FI_WAIT_NONE;
            assert_eq!(calls::fi_eq_open(object, &mut attr, &mut events), 0, "{provider}");
            let mut entry = [0u64; 8];
            assert_eq!(calls::fi_cq_read(queue, entry.as_mut_ptr().cast(), 1).0, -11, "{provider}");
            assert_eq!(calls::fi_close(&raw mut (*events).fid), 0, "{provider}");
            assert_eq!(calls::fi_close(&raw mut (*queue).fid), 0, "{provider}");
            assert_eq!(calls::fi_close(&raw mut (*domain).fid), 0, "{provider}");
            assert_eq!(calls::fi_close(&raw mut (*object).fid), 0, "{provider}");
            freeinfo(found);
        }
    }
}

/// A table without a function answers as the headers do.
#[test]
fn what_an_object_lacks_is_an_error() {
    let mut table = libfabric_sys::fi_ops { size: size_of::<libfabric_sys::fi_ops>(), ..Default::default() };
    let mut object = libfabric_sys::fid { ops: &mut table, ..Default::default() };
    // SAFETY: an object of our own whose table is empty.
    assert_eq!(unsafe { calls::fi_close(&mut object) }, -38);
    object.ops = ptr::null_mut();
    // SAFETY: as above, without a table.
    assert_eq!(unsafe { calls::fi_close(&mut object) }, -38);
}
