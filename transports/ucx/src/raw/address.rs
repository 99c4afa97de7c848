//! Addresses of other programs' workers.
//!
//! UCX takes an address without its length and follows what it says. The layout is that of UCX 1.13 to 1.23, in both of its versions
//! (`src/ucp/wireup/address.c`, the comments at its head): header, identity, then devices with their interfaces.

/// Interfaces that UCX takes.
const INTERFACES_MAX: usize = 128;
/// Bytes of the longest address that is taken; 32 devices have about 6 KiB.
const BYTES_MAX: usize = 1 << 16;
/// Behind what was checked: should a later UCX look further than it is meant to, it finds an end.
const PADDING: usize = 512;

/// The address is of a worker that has one.
const HAS_IDENTITY: u8 = 2;
const HAS_NAME: u8 = 1;
const HAS_CLIENT: u8 = 4;
/// Flags of the header that are understood.
const KNOWN: u8 = HAS_NAME | HAS_IDENTITY | HAS_CLIENT | 8;
/// In the byte of a device's or an interface's length.
const LAST: u8 = 0x80;
const HAS_PATHS: u8 = 0x40;
const HAS_SYSTEM_DEVICE: u8 = 0x20;
const HAS_ENDPOINT: u8 = 0x40;
const DEVICE_LENGTH: u8 = 0x1f;
const INTERFACE_LENGTH: u8 = 0x3f;
/// In the byte of a memory domain's number.
const EMPTY: u8 = 0x80;
const DOMAIN: u8 = 0x7f;
/// What stands for an empty list.
const NOTHING: u8 = 0xff;

/// A worker's address whose structure was checked: every length in it stays inside it, and it ends where its last device does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WorkerAddress {
    padded: Vec<u8>,
    interfaces: usize,
}

impl WorkerAddress {
    /// Checks an address that came from somewhere else. The error says what is wrong, and where.
    pub fn check(bytes: &[u8]) -> Result<WorkerAddress, String> {
        if bytes.len() > BYTES_MAX {
            return Err(format!("a worker address of {} bytes; at most {BYTES_MAX} are taken", bytes.len()));
        }
        let mut walk = Walk { bytes, at: 0 };
        let interfaces = walk.address()?;
        if walk.at != bytes.len() {
            return Err(format!("the worker address ends at byte {} of {}", walk.at, bytes.len()));
        }
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len() + PADDING - 1, NOTHING);
        // And an end of texts.
        padded.push(0);
        Ok(WorkerAddress { padded, interfaces })
    }

    /// How many ways to reach the worker it names.
    pub fn interfaces(&self) -> usize {
        self.interfaces
    }

    /// The bytes as they came.
    pub fn bytes(&self) -> &[u8] {
        self.padded.get(..self.padded.len() - PADDING).unwrap_or_default()
    }

    /// The bytes with an end behind them.
    pub(super) fn padded(&self) -> &[u8] {
        &self.padded
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

struct Walk<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    /// The number of interfaces.
    fn address(&mut self) -> Result<usize, String> {
        let header = self.byte()?;
        let (version, flags) = match header & 0x0f {
            0 => (Version::One, header >> 4),
            1 => (Version::Two, self.byte()?),
            other => return Err(format!("a worker address of version {}, which no known UCX writes", other + 1)),
        };
        if flags & HAS_IDENTITY == 0 || flags & !KNOWN != 0 {
            return Err(format!("flags {flags:#x}: not the address of a worker of UCX 1.12 or later"));
        }
        self.skip(8)?;
        if flags & HAS_CLIENT != 0 {
            self.skip(8)?;
        }
        if flags & HAS_NAME != 0 {
            let name = usize::from(self.byte()?);
            self.skip(name)?;
        }
        if self.bytes.get(self.at) == Some(&NOTHING) {
            self.at += 1;
            return Err(
                "the worker cannot be reached by anything: check UCX_TLS and UCX_NET_DEVICES of its process".to_owned()
            );
        }
        let mut interfaces = 0;
        while !self.device(version, &mut interfaces)? {}
        match interfaces {
            0 => Err("the worker address names no interface".to_owned()),
            _ => Ok(interfaces),
        }
    }

    /// Says whether it was the last.
    fn device(&mut self, version: Version, interfaces: &mut usize) -> Result<bool, String> {
        let domain = self.byte()?;
        let empty = domain & EMPTY != 0;
        self.extended(version, domain, DOMAIN)?;
        let length = self.byte()?;
        let bytes = self.extended(version, length, DEVICE_LENGTH)?;
        if length & HAS_PATHS != 0 {
            self.skip(1)?;
        }
        if length & HAS_SYSTEM_DEVICE != 0 {
            self.skip(1)?;
        }
        self.skip(bytes)?;
        let mut last = empty;
        while !last {
            *interfaces += 1;
            if *interfaces > INTERFACES_MAX {
                return Err(format!("more than {INTERFACES_MAX} interfaces"));
            }
            last = self.interface(version)?;
        }
        Ok(length & LAST != 0)
    }

    /// Says whether it was the last of its device.
    fn interface(&mut self, version: Version) -> Result<bool, String> {
        // A checksum of the transport's name.
        self.skip(2)?;
        let at = self.at;
        match version {
            Version::One => {
                self.skip(4)?;
                let bandwidth = f32::from_le_bytes(self.array()?);
                if !(bandwidth.is_finite() && bandwidth > 0.0) {
                    return Err(format!("an interface with a bandwidth of {bandwidth} at byte {at}"));
                }
                self.skip(8)?;
            }
            Version::Two => {
                self.skip(1)?;
                if self.byte()? == 0 {
                    return Err(format!("an interface without bandwidth at byte {at}"));
                }
                self.skip(6)?;
            }
        }
        let length = self.byte()?;
        let bytes = self.extended(version, length, INTERFACE_LENGTH)?;
        self.skip(bytes)?;
        // Those are of endpoints, which a worker's address does not name.
        if length & HAS_ENDPOINT != 0 {
            return Err(format!("an interface with an endpoint at byte {at}: not a worker's address"));
        }
        Ok(length & LAST != 0)
    }

    /// A number in the low bits of a byte, or in the next byte where the second version has no room there.
    fn extended(&mut self, version: Version, byte: u8, mask: u8) -> Result<usize, String> {
        let value = byte & mask;
        let value = if version == Version::Two && value == mask { self.byte()? } else { value };
        Ok(usize::from(value))
    }

    fn byte(&mut self) -> Result<u8, String> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let bytes = self.bytes.get(self.at..self.at + N).and_then(|bytes| bytes.try_into().ok());
        let bytes = bytes.ok_or_else(|| self.cut())?;
        self.at += N;
        Ok(bytes)
    }

    fn skip(&mut self, bytes: usize) -> Result<(), String> {
        if self.bytes.len() - self.at < bytes {
            return Err(self.cut());
        }
        self.at += bytes;
        Ok(())
    }

    fn cut(&self) -> String {
        format!("the worker address is cut: {} bytes are not all of it", self.bytes.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Version 1, as a NIXL agent gave it.
    fn first() -> Vec<u8> {
        let metadata = include_bytes!("../../../../engines/nixl/tests/captured/agent-1.5.1.bin");
        metadata[75..75 + 106].to_vec()
    }

    #[test]
    fn a_real_address_is_taken_as_it_is() {
        let bytes = first();
        let address = WorkerAddress::check(&bytes).unwrap();
        assert_eq!(address.bytes(), bytes);
        assert!(address.interfaces() >= 1);
    }

    #[test]
    fn whatever_is_cut_or_goes_on_is_refused() {
        let bytes = first();
        for end in 0..bytes.len() {
            assert!(WorkerAddress::check(&bytes[..end]).is_err(), "{end}");
        }
        let error = WorkerAddress::check(&[bytes.clone(), vec![0]].concat()).unwrap_err();
        assert!(error.contains("ends at byte 106 of 107"), "{error}");
        assert!(WorkerAddress::check(&vec![0x20; BYTES_MAX + 1]).is_err());
    }

    #[test]
    fn no_byte_makes_it_look_outside() {
        let bytes = first();
        for at in 0..bytes.len() {
            for byte in 0..=255 {
                let mut changed = bytes.clone();
                changed[at] = byte;
                // Taken or refused, without a panic; what is taken is as long.
                if let Ok(address) = WorkerAddress::check(&changed) {
                    assert_eq!(address.bytes().len(), changed.len());
                }
            }
        }
        let with = |byte: u8| {
            let mut changed = bytes.clone();
            changed[0] = byte;
            WorkerAddress::check(&changed).unwrap_err()
        };
        assert!(with(0x22).contains("version 3"), "{}", with(0x22));
        assert!(with(0x00).contains("flags"), "{}", with(0x00));
    }
}
