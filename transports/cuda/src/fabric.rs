//! Why fabric handles, which other hosts could open, are not to be had: in words.

use std::path::Path;

use crate::driver::CudaError;

/// Where the driver keeps a device for every IMEX channel that this process may be let into.
const CHANNELS: &str = "/dev/nvidia-caps-imex-channels";

/// What a refusal of the driver means here.
pub(crate) fn refusal(error: &CudaError) -> String {
    words(&error.to_string(), &channels(Path::new(CHANNELS)))
}

/// A channel, and why it cannot be used, if it cannot.
type Channel = (String, Option<String>);

fn channels(folder: &Path) -> Vec<Channel> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let open = |name: &String| std::fs::File::options().read(true).write(true).open(folder.join(name));
    let channel = |name: String| {
        let refused = open(&name).err().map(|error| error.to_string());
        (name, refused)
    };
    let mut channels: Vec<Channel> = names.filter(|name| name.starts_with("channel")).map(channel).collect();
    channels.sort();
    channels
}

fn words(error: &str, channels: &[Channel]) -> String {
    let usable = channels.iter().find(|(_, refused)| refused.is_none());
    match (usable, channels.first()) {
        (Some((name, _)), _) => format!(
            "{error}; {CHANNELS}/{name} can be used: does nvidia-imex run here, and is the GPU registered with its fabric (nvidia-smi -q, Fabric)?"
        ),
        (None, Some((name, refused))) => format!(
            "{error}; {CHANNELS}/{name} cannot be used ({}): it has to be readable and writable for this process",
            refused.as_deref().unwrap_or("unknown")
        ),
        (None, None) => format!(
            "{error}; there is no IMEX channel in {CHANNELS}: on GB200, have the driver make one (NVreg_CreateImexChannel0=1), or the container be \
             given one (a ComputeDomain's claim); hosts without NVLink between them need none"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_the_way_is_named() {
        let none = words("refused", &[]);
        assert!(none.starts_with("refused; there is no IMEX channel in /dev/nvidia-caps-imex-channels"), "{none}");
        let denied = ("channel0".to_owned(), Some("Permission denied".to_owned()));
        let closed = words("refused", std::slice::from_ref(&denied));
        assert!(closed.contains("channel0 cannot be used (Permission denied)"), "{closed}");
        let open = words("refused", &[denied, ("channel7".to_owned(), None)]);
        assert!(open.contains("channel7 can be used") && open.contains("nvidia-imex"), "{open}");
    }

    #[test]
    fn channels_are_looked_for_by_opening_them() {
        let folder = std::env::temp_dir().join(format!("kvferry-imex-{}", std::process::id()));
        assert_eq!(channels(&folder), []);
        std::fs::create_dir(&folder).unwrap();
        for name in ["channel2", "other"] {
            std::fs::write(folder.join(name), "").unwrap();
        }
        // One that nobody, not even the superuser, can open for writing.
        std::fs::create_dir(folder.join("channel1")).unwrap();
        let found = channels(&folder);
        std::fs::remove_dir_all(&folder).unwrap();
        assert_eq!(found.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["channel1", "channel2"]);
        assert_eq!(found.iter().map(|(_, refused)| refused.is_none()).collect::<Vec<_>>(), [false, true]);
    }
}
