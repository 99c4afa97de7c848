//! Element types of KV.

use core::fmt;
use core::str::FromStr;

use serde::{Deserialize, Serialize};

/// The type of one element. kvferry moves elements and never converts them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Dtype {
    /// 32-bit float.
    F32,
    /// bfloat16.
    Bf16,
    /// 16-bit float.
    F16,
    /// 8-bit float with 4 exponent bits, what `fp8` means without more.
    Fp8E4m3,
    /// 8-bit float with 5 exponent bits.
    Fp8E5m2,
    /// Signed byte.
    Int8,
    /// Unsigned byte.
    Uint8,
}

const NAMES: [(Dtype, &str); 7] = [
    (Dtype::F32, "f32"),
    (Dtype::Bf16, "bf16"),
    (Dtype::F16, "f16"),
    (Dtype::Fp8E4m3, "fp8"),
    (Dtype::Fp8E5m2, "fp8_e5m2"),
    (Dtype::Int8, "int8"),
    (Dtype::Uint8, "uint8"),
];

impl Dtype {
    /// Bytes of one element.
    pub fn bytes(self) -> u32 {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::Fp8E4m3 | Dtype::Fp8E5m2 | Dtype::Int8 | Dtype::Uint8 => 1,
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = NAMES.iter().find(|(dtype, _)| dtype == self).map_or("", |(_, name)| name);
        f.write_str(name)
    }
}

/// A name that is no [`Dtype`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no dtype: use bf16, f16, f32, fp8, fp8_e5m2, int8 or uint8")]
pub struct UnknownDtype(pub String);

impl FromStr for Dtype {
    type Err = UnknownDtype;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let lower = text.to_ascii_lowercase();
        let name = match lower.as_str() {
            "bfloat16" => "bf16",
            "fp16" | "float16" | "half" => "f16",
            "fp32" | "float32" | "float" => "f32",
            "fp8_e4m3" | "e4m3" => "fp8",
            "e5m2" => "fp8_e5m2",
            "i8" => "int8",
            "u8" => "uint8",
            other => other,
        };
        let found = NAMES.iter().find(|(_, known)| *known == name);
        found.map(|(dtype, _)| *dtype).ok_or_else(|| UnknownDtype(text.to_owned()))
    }
}
