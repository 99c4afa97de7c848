//! What `nvidia-smi -q` prints, as far as it concerns the NVLink fabric.

/// A host's GPUs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Smi {
    pub(crate) driver: Option<String>,
    pub(crate) gpus: Vec<Gpu>,
}

/// One GPU.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Gpu {
    /// As it is printed: `00000008:01:00.0`.
    pub(crate) address: String,
    /// `NVIDIA GB200`.
    pub(crate) product: String,
    /// The lines below `Fabric`; drivers that cannot tell have none.
    pub(crate) fabric: Option<Vec<(String, String)>>,
}

impl Gpu {
    /// A value of the fabric's.
    pub(crate) fn fabric(&self, name: &str) -> &str {
        let mut lines = self.fabric.iter().flatten();
        lines.find(|(known, _)| known == name).map_or("", |(_, value)| value.as_str())
    }

    /// Whether it is made for NVLink between hosts.
    pub(crate) fn is_of_a_rack(&self) -> bool {
        ["GB200", "GB300"].iter().any(|name| self.product.contains(name))
    }

    /// Whether it takes part in a fabric, by what it says.
    pub(crate) fn has_fabric(&self) -> bool {
        let state = self.fabric("State");
        !(state.is_empty() || state.eq_ignore_ascii_case("n/a") || state.eq_ignore_ascii_case("not supported"))
    }

    /// Whether it was given a cluster: zeros mean that it is in no domain of several hosts.
    pub(crate) fn is_registered(&self) -> bool {
        self.fabric("ClusterUUID").chars().any(|digit| digit.is_ascii_hexdigit() && digit != '0')
            && self.fabric("CliqueId").parse::<u32>().is_ok()
    }

    /// In one line.
    pub(crate) fn line(&self) -> String {
        let [state, status, cluster, clique] =
            ["State", "Status", "ClusterUUID", "CliqueId"].map(|name| match self.fabric(name) {
                "" => "?",
                value => value,
            });
        format!("GPU {}: {state}, {status}, cluster {cluster}, clique {clique}", self.address)
    }
}

/// Reads it. Sections are told by their indentation; what is not known is passed over.
pub(crate) fn read(text: &str) -> Smi {
    let mut smi = Smi::default();
    let mut within = None;
    for line in text.lines() {
        let indent = line.len() - line.trim_start().len();
        if let Some(address) = line.strip_prefix("GPU ") {
            smi.gpus.push(Gpu { address: cut(address), ..Gpu::default() });
            within = None;
            continue;
        }
        if within.is_some_and(|section| indent <= section) {
            within = None;
        }
        let (name, value) =
            line.split_once(':').map_or((line.trim(), None), |(name, value)| (name.trim(), Some(value)));
        match (smi.gpus.last_mut(), value) {
            (None, Some(value)) if name == "Driver Version" => smi.driver = Some(cut(value)),
            (Some(gpu), Some(value)) if name == "Product Name" => gpu.product = cut(value),
            (Some(gpu), None) if within.is_none() && name == "Fabric" => {
                gpu.fabric = Some(Vec::new());
                within = Some(indent);
            }
            (Some(gpu), Some(value)) if within.is_some() => {
                let lines = gpu.fabric.get_or_insert_default();
                if lines.len() < LINES_MAX {
                    lines.push((cut(name), cut(value)));
                }
            }
            _ => {}
        }
    }
    smi
}

/// Lines of one section that are kept; there are a dozen.
const LINES_MAX: usize = 64;
/// Characters of a value that are kept.
const VALUE_MAX: usize = 120;

fn cut(text: &str) -> String {
    text.trim().chars().take(VALUE_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
==============NVSMI LOG==============
Driver Version                            : 570.124.06
GPU 00000008:01:00.0
    Product Name                          : NVIDIA GB200
    Clocks
        State                             : of something else
    Fabric
        State                             : Completed
        Status                            : Success
        CliqueId                          : 32766
        ClusterUUID                       : 5b1c0102-0304-0506-0708-090a0b0c0d0e
        Health
            Bandwidth                     : Full
    Processes                             : None
GPU 00000009:01:00.0
    Fabric
        State                             : N/A
";

    #[test]
    fn sections_end_where_indentation_does() {
        let smi = read(TEXT);
        assert_eq!((smi.driver.as_deref(), smi.gpus.len()), (Some("570.124.06"), 2));
        assert_eq!(smi.gpus[0].fabric.as_ref().unwrap().len(), 5);
        assert_eq!(smi.gpus[0].fabric("State"), "Completed");
        assert_eq!(smi.gpus[0].fabric("Bandwidth"), "Full");
        assert!(smi.gpus[0].has_fabric() && smi.gpus[0].is_registered());
        assert!(!smi.gpus[1].has_fabric() && !smi.gpus[1].is_registered());
    }

    #[test]
    fn a_product_says_what_it_is_made_for() {
        assert!(read(TEXT).gpus[0].is_of_a_rack() && !read(TEXT).gpus[1].is_of_a_rack());
        assert!(!read(&TEXT.replace("NVIDIA GB200", "NVIDIA GH200 480GB")).gpus[0].is_of_a_rack());
    }

    #[test]
    fn zeros_and_no_clique_are_no_registration() {
        for (from, to) in
            [("5b1c0102-0304-0506-0708-090a0b0c0d0e", "00000000-0000-0000-0000-000000000000"), ("32766", "N/A")]
        {
            assert!(!read(&TEXT.replace(from, to)).gpus[0].is_registered(), "{to}");
        }
        // A clique has the number 0 in a domain that is not divided.
        assert!(read(&TEXT.replace("32766", "0")).gpus[0].is_registered());
    }

    /// Cut anywhere, on any line: nothing but less.
    #[test]
    fn cut_and_hostile_texts_are_read() {
        for end in 0..TEXT.len() {
            assert!(read(&TEXT[..end]).gpus.len() <= 2);
        }
        let long = format!("GPU {0}\n Fabric\n  {0}: {0}\n", "x".repeat(1 << 20));
        assert_eq!(read(&long).gpus[0].address.len(), VALUE_MAX);
        let many = format!("GPU 1\n Fabric\n{}", "  a: b\n".repeat(1 << 16));
        assert_eq!(read(&many).gpus[0].fabric.as_ref().unwrap().len(), LINES_MAX);
    }
}
