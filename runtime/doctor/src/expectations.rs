//! What somebody says that the host must have.

use std::str::FromStr;

use thiserror::Error;

/// Numbers that must be met exactly.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Expectations {
    /// EFA devices.
    pub efa: Option<u32>,
    /// NVIDIA GPUs.
    pub gpu: Option<u32>,
    /// IMEX channels.
    pub imex: Option<u32>,
    /// Gigabits per second of all active EFA ports together.
    pub gbps: Option<u32>,
}

/// Why it is no expectation.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("`{part}` is not efa=N, gpu=N, imex=N or gbps=N; write for example efa=4,gpu=8")]
pub struct ExpectationError {
    part: String,
}

impl FromStr for Expectations {
    type Err = ExpectationError;

    fn from_str(text: &str) -> Result<Expectations, ExpectationError> {
        let mut expected = Expectations::default();
        for part in text.split(',').map(str::trim) {
            let wrong = || ExpectationError { part: part.chars().take(40).collect() };
            let (name, number) = part.split_once('=').ok_or_else(wrong)?;
            let number = Some(number.parse::<u32>().map_err(|_| wrong())?);
            match name {
                "efa" => expected.efa = number,
                "gpu" => expected.gpu = number,
                "imex" => expected.imex = number,
                "gbps" => expected.gbps = number,
                _ => return Err(wrong()),
            }
        }
        Ok(expected)
    }
}
