//! The form of `nvidia-smi -q`, as far as it concerns the fabric.

use std::fmt::Write;

/// One GPU.
pub(crate) struct Gpu {
    /// `00000008:01:00.0`.
    pub(crate) address: String,
    pub(crate) name: Option<String>,
    /// `None` where the driver has no call for it.
    pub(crate) fabric: Option<Fabric>,
}

/// Its place in an NVLink fabric; by default there is none.
#[derive(Default)]
pub(crate) struct Fabric {
    /// `nvmlGpuFabricState_t`.
    pub(crate) state: u8,
    pub(crate) status: String,
    pub(crate) clique: u32,
    pub(crate) cluster: [u8; 16],
    /// The mask, and from version 3 on the summary.
    pub(crate) health: Option<(u32, Option<u8>)>,
}

impl Fabric {
    /// Cluster and clique, where the GPU is registered with a fabric of several hosts.
    pub(crate) fn place(&self) -> Option<([u8; 16], u32)> {
        let is_registered = self.state == COMPLETED && self.status == SUCCESSFUL && self.cluster != [0; 16];
        is_registered.then_some((self.cluster, self.clique))
    }

    /// How far its registration is.
    pub(crate) fn state(&self) -> String {
        word(&STATES, self.state.into())
    }
}

/// Shift, width, what it is called, and its values' words.
const HEALTH: [(u32, u32, &str, &[&str]); 6] = [
    (0, 0x3, "Bandwidth", &["N/A", "Degraded", "Full"]),
    (2, 0x3, "Route Recovery in progress", YES),
    (4, 0x3, "Route Unhealthy", YES),
    (6, 0x3, "Access Timeout Recovery", YES),
    (
        8,
        0xf,
        "Incorrect Configuration",
        &[
            "N/A",
            "None",
            "Incorrect SysGuid",
            "Incorrect Chassis Serial Number",
            "No Partition",
            "Insufficient Nvlinks",
            "Incompatible GPU Firmware",
            "Invalid Location",
            "GPU State Invalid",
        ],
    ),
    (12, 0x3, "Partition Assigned", YES),
];
const YES: &[&str] = &["N/A", "True", "False"];
const SUMMARY: &[&str] = &["N/A", "Healthy", "Unhealthy", "Limited Capacity"];
const NOT_SUPPORTED: u8 = 0;
const COMPLETED: u8 = 3;
/// A status.
pub(crate) const SUCCESSFUL: &str = "Success";
const STATES: [&str; 4] = ["N/A", "Not Started", "In Progress", "Completed"];

/// All GPUs under one heading.
pub(crate) fn write(driver: Option<&str>, gpus: &[Gpu]) -> String {
    let mut text = format!("{:<42}: {}\n", "Driver Version", driver.unwrap_or("N/A"));
    line(&mut text, 0, "Attached GPUs", &gpus.len().to_string());
    for gpu in gpus {
        let _infallible = writeln!(text, "GPU {}", gpu.address);
        line(&mut text, 4, "Product Name", gpu.name.as_deref().unwrap_or("N/A"));
        if let Some(fabric) = &gpu.fabric {
            section(&mut text, fabric);
        }
    }
    text
}

fn section(text: &mut String, fabric: &Fabric) {
    text.push_str("    Fabric\n");
    if fabric.state == NOT_SUPPORTED {
        for name in ["State", "Status", "CliqueId", "ClusterUUID"] {
            line(text, 8, name, "N/A");
        }
        return;
    }
    line(text, 8, "State", &fabric.state());
    line(text, 8, "Status", &fabric.status);
    line(text, 8, "CliqueId", &fabric.clique.to_string());
    line(text, 8, "ClusterUUID", &uuid(&fabric.cluster));
    let Some((mask, summary)) = fabric.health else { return };
    text.push_str("        Health\n");
    if let Some(summary) = summary {
        line(text, 12, "Summary", &word(SUMMARY, summary.into()));
    }
    for (shift, width, name, words) in HEALTH {
        line(text, 12, name, &word(words, mask >> shift & width));
    }
}

fn line(text: &mut String, indent: usize, name: &str, value: &str) {
    let _infallible = writeln!(text, "{:indent$}{name:<width$}: {value}", "", width = 42 - indent);
}

/// Numbers that releases to come may have are shown as such.
fn word(words: &[&str], number: u32) -> String {
    words.get(number as usize).map_or_else(|| format!("Unknown ({number})"), |word| (*word).to_owned())
}

pub(crate) fn uuid(bytes: &[u8; 16]) -> String {
    let mut text = String::new();
    for (at, byte) in bytes.iter().enumerate() {
        if matches!(at, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        let _infallible = write!(text, "{byte:02x}");
    }
    text
}
