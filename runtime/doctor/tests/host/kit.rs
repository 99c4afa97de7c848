//! What the modules share: the page's question, changes to it, and what a report finds wrong.

use kvferry_doctor::{Question, Report, Status};

/// Plugins that the decode image brings.
pub(crate) const BUNDLED: &str = "/opt/dynamo/venv/lib/python3.12/site-packages/tensorrt_llm/libs/nixl/plugins";

pub(crate) fn page() -> Question {
    let variables = [
        ("FI_PROVIDER", "efa"),
        ("FI_EFA_USE_DEVICE_RDMA", "1"),
        ("FI_EFA_ENABLE_SHM_TRANSFER", "0"),
        ("LD_LIBRARY_PATH", "/opt/amazon/efa/lib:/usr/local/lib:/usr/lib"),
    ];
    let environment = variables.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
    Question { environment, ..Question::default() }
}

pub(crate) fn wrong(report: &Report) -> Vec<(&'static str, Status)> {
    report.checks.iter().filter(|check| check.status != Status::Ok).map(|check| (check.id, check.status)).collect()
}

pub(crate) fn set(question: &mut Question, name: &str, value: &str) {
    question.environment.insert(name.to_owned(), value.to_owned());
}

pub(crate) fn page_of_gb200(question: &mut Question) {
    for name in ["NCCL_MNNVL_ENABLE", "NCCL_CUMEM_ENABLE", "NCCL_NVLS_ENABLE"] {
        set(question, name, "1");
    }
}
